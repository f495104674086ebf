"""Folds side by side against one after the other, one training in two processes, and what a checkpoint costs.

python tests/benchmarks/folds.py [--size 96] [--patches 96] [--turns 2] [--networks unet deeplabv3plus] [--csv FILE]

The folds are those of `cross_validate`, once with n_jobs=1, where a fold has all cores, and once with two workers that share them; starting the workers is counted. A checkpoint costs the time for which training waits
for it (a copy in memory), compared with an epoch of 60 s, and processor time of the thread that writes it, compared with that of all cores in 60 s (on a GPU nobody needs it).
"""
import argparse, os, sys, tempfile, time
from pathlib import Path
from statistics import median
from cellseg.crossval import cross_validate
from cellseg.data import patch_dls
from cellseg.distributed import launch
from cellseg.learner import Checkpoint, seg_learner
from cellseg.simulate import simulate_fields
from common import in_turns, load, machine, row, show
from networks import write

def side_by_side(folder, size, patches, turns):
    "Two folds with two workers, over two folds one after the other"
    fields,n = simulate_fields(folder/'data', 4, (384,512), seed=1, confluence=.6).assign(fold=[0,0,1,1]),[0]
    def folds(n_jobs):
        n[0] += 1
        cross_validate(fields, 'unet', folder/f'cv{n[0]}', n_jobs=n_jobs, size=size, n_train=patches, n_valid=8, epochs=2, precision='float32')
    t = in_turns({k:lambda k=k: folds(k) for k in (1,2)}, turns, warm=0)
    return row('two folds side by side / one after the other', t[2], t[1], 's', t[2]/t[1], '<= 1.15')

def _epoch(fields, folder, size, patches, bs):
    dls = patch_dls(fields, size=size, bs=bs, n_train=patches, n_valid=2)
    learn = seg_learner(dls, path=folder, precision='float32')
    learn.fit_paper(2)
    return learn.path/'history.csv'

def two_processes(folder, size, patches):
    "The second epoch of one training: two processes with half a batch each, over one with a thread for each core"
    import pandas as pd
    fields = simulate_fields(folder/'data2', 3, (384,512), seed=2, confluence=.6).assign(fold=[0,1,2])
    two,one = (pd.read_csv(f).seconds.iloc[1] for f in (launch(_epoch, 2, fields, folder/'two', size, patches, 4),_epoch(fields, folder/'one', size, patches, 8)))
    return row('an epoch in two processes / in one with all threads', two, one, 's', two/one)

def checkpoint(folder, arch):
    "What a checkpoint adds to an epoch of 60 s"
    waits,works = [],[]
    after,write = Checkpoint.after_epoch,Checkpoint._write
    def timed_after(self): self.written(); start = time.perf_counter(); after(self); waits.append(time.perf_counter()-start) # the one before is written by then if epochs are long
    def timed_write(self, s): start = time.thread_time(); write(self, s); works.append(time.thread_time()-start)
    Checkpoint.after_epoch,Checkpoint._write = timed_after,timed_write
    fields = simulate_fields(folder/f'data-{arch}', 3, (96,128), seed=3, confluence=.6).assign(fold=[0,1,2])
    try: seg_learner(patch_dls(fields, size=32, bs=2, n_train=20, n_valid=2), arch, folder/arch, 'float32').fit_fast(7)
    finally: Checkpoint.after_epoch,Checkpoint._write = after,write
    wait,work,cores = median(waits),median(works),os.cpu_count()
    what = f'{(folder/arch/"checkpoint.pt").stat().st_size/1e6:.0f} MB of {arch}'
    return [row(f'checkpoint, {what}: training waits / 60 s', wait, 60, 's', wait/60, '<= 0.02'), row(f'checkpoint, {what}: writing / processors in 60 s', work, 60*cores, 's', work/60/cores)]

def rows(size=96, patches=96, turns=2, networks=('unet','deeplabv3plus')):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        return [*(r for a in networks for r in checkpoint(folder, a)),side_by_side(folder, size, patches, turns),two_processes(folder, size, patches)]

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=96); p.add_argument('--patches', type=int, default=96); p.add_argument('--turns', type=int, default=2)
    p.add_argument('--networks', nargs='+', default=['unet','deeplabv3plus']); p.add_argument('--csv', help='file to write the rows to')
    args = vars(p.parse_args())
    file = args.pop('csv')
    print(load())
    result = rows(**args)
    show(result); print(machine())
    if file: write([r | dict(machine=machine(), command='python tests/benchmarks/folds.py '+' '.join(sys.argv[1:])) for r in result], file)
