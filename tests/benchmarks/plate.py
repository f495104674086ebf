"""Plates over Dask: two workers against one, and time and memory from 24 to 240 fields.

    python tests/benchmarks/plate.py [run folder]

Simulated fields of 512x640 pixels, predicted by the U-Net of the run folder (else an untrained one), numbered, measured and written; workers have one thread each. Starting a cluster is timed by itself. Writes results/plate.csv.
"""
import os, shutil, sys, tempfile, threading, time
from pathlib import Path
os.environ['OMP_NUM_THREADS'] = os.environ['LOKY_MAX_CPU_COUNT'] = '1' # each worker computes with one thread, also when it is alone

def watch(processes, stop, peak):
    "Largest resident memory of these processes, together and each, in GB"
    import psutil
    while not stop.wait(.2):
        used = []
        for p in processes:
            try: used.append(p.memory_info().rss/1e9)
            except psutil.Error: pass # a worker that has ended
        peak[0],peak[1] = max(peak[0], sum(used)),max(peak[1], max(used, default=0))

def run(fields, seg, out, client):
    "Seconds of a plate, and the largest memory of a worker and of this process"
    import psutil
    from cellseg.plate import run_plate
    workers = [psutil.Process(p) for p in client.run(os.getpid).values()]
    stop,peak,own = threading.Event(),[0,0],[0,0]
    watchers = [threading.Thread(target=watch, args=a) for a in ((workers,stop,peak),([psutil.Process()],stop,own))]
    for w in watchers: w.start()
    start = time.perf_counter()
    p = run_plate(fields, seg, out, client=client)
    took = time.perf_counter()-start
    stop.set()
    for w in watchers: w.join()
    assert p.fields.problem.isna().all()
    shutil.rmtree(out)
    return took,peak[1],own[1]

def main(folder=None):
    import pandas as pd
    from cellseg.core import seeded
    from cellseg.models.registry import create_model
    from cellseg.plate import local_cluster
    from cellseg.predict import Segmenter
    from cellseg.simulate import simulate_fields
    from common import machine, load
    if folder: seg = Segmenter.load(folder)
    else:
        with seeded(0): seg = Segmenter(create_model('unet'), 'unet')
    tmp,rows = Path(tempfile.mkdtemp()),[]
    made = simulate_fields(tmp/'images', 24, (512,640), seed=1, confluence=.7)[['field','brightfield']]
    many = pd.concat([made.assign(field=made.field+f'_{i}') for i in range(10)], ignore_index=True)
    for n in (1,2):
        start = time.perf_counter()
        with local_cluster(n) as client:
            run(made[:2*n], seg, tmp/'warm', client) # workers import torch and load the network
            begun = time.perf_counter()-start
            for fields,turns in ((made,3),(many,1 if n==2 else 0)):
                for t in range(turns): rows.append((n,len(fields),*run(fields, seg, tmp/f'out{n}{t}', client),begun)); print(rows[-1], flush=True)
    shutil.rmtree(tmp)
    t = pd.DataFrame(rows, columns=['workers','fields','seconds','GB of a worker','GB of the caller','seconds to begin']).groupby(['workers','fields'], as_index=False).median()
    t['fields a second'] = t.fields/t.seconds
    one,two,ten = (t[(t.workers==w)&(t.fields==f)].seconds.item() for w,f in ((1,24),(2,24),(2,240)))
    print(t.round(2).to_string(index=False))
    print(f'two workers against one: {one/two:.2f}x as fast (wanted 1.8)\n240 fields against 24: {ten/two:.2f}x the time for 10x the fields')
    return t.assign(machine=f'{machine()}, {load()}', command=f"python tests/benchmarks/plate.py{' <run folder>' if folder else ''}")

if __name__=='__main__': main(*sys.argv[1:]).round(3).to_csv(Path(__file__).parent/'results'/'plate.csv', index=False)
