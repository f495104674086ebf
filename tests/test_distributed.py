"""Two processes on the CPU share a training, as eight GPUs would

What they do is in functions that `launch` starts; run as a program, this file is what torchrun starts."""
import hashlib, json, os, signal, subprocess, sys, threading, time
from pathlib import Path
import nbformat, pandas as pd, psutil, pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import Metric
from fastai.torch_core import get_model, num_distrib, rank_distrib
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from safetensors.torch import load_file
from cellseg.core import CellsegError
from cellseg.data import generators, patch_dls
from cellseg.distributed import RankDL, launch
from cellseg.fields import load_fields, save_fields
from cellseg.learner import all_ranks, from_rank0, seg_learner
from cellseg.run import Run
from cellseg.simulate import simulate_fields

def learner(folder, out, bs, n_train=12, network=dict(arch='unet'), **kwargs):
    dls = patch_dls(load_fields(folder/'data'/'fields.csv'), size=32, bs=bs, n_train=n_train, n_valid=5, **kwargs)
    return seg_learner(dls, path=folder/out, precision='float32', seed=3, **network)

def with_dropout(folder, out): # each process leaves out other features
    return learner(folder, out, 2, n_train=8, network=dict(arch='tiramisu', layers=(2,2), bottom=2, growth=8, first=8))

class FirstGradients(Callback):
    "In double precision, with batch normalisation at rest; stops before the first step"
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.eval()
    def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)
    def before_step(self):
        self.grads = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        raise CancelFitException

def first_gradients(folder, out, bs):
    learn,cb = learner(folder, out, bs, batch_tfms=()),FirstGradients()
    learn.model.double()
    learn.fit_paper(1, cbs=[cb])
    return cb.grads

def digest(tensors): return hashlib.sha256(b''.join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()

class Watch(Callback):
    "After each epoch: the patches of each process, and whether all have the same network and optimiser"
    order = 70 # after all others
    def before_fit(self): self.patches,self.equal = [],[]
    def after_train(self):
        items,idxs = self.dls.train_ds.tls[0].items,self.dl.get_idxs()
        self.patches.append(all_ranks([items[i].item() for i in idxs]))
    def after_epoch(self):
        network,moments = get_model(self.model).state_dict().values(),[v for s in self.opt.opt.state.values() for v in s.values()]
        self.equal.append([len(set(all_ranks(digest(x))))==1 for x in (network,moments)])

class Steps(Callback):
    "Weights of all processes just before and just after `Ranks` may average them"
    def __init__(self, order): self.order,self.weights = order,[]
    def after_step(self): self.weights.append(all_ranks(torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])))

def whole_training(folder, out):
    watch,learn = Watch(),with_dropout(folder, out)
    learn.fit_fast(4, cbs=[watch])
    return dict(patches=watch.patches, equal=watch.equal, rngs=all_ranks([g.bit_generator.state['state']['state'] for g in generators(learn.dls)]),
        dropout=all_ranks(torch.load(learn.path/'checkpoint.pt')['random'][rank_distrib()]['torch'].tolist()))

def local_training(folder):
    before,after,watch = Steps(10),Steps(12),Watch()
    learn = learner(folder, 'local', 1, n_train=10).distribute(sync_every=2) # five steps an epoch
    learn.fit_paper(2, cbs=[before,after,watch])
    return before.weights,after.weights,watch.equal

class Never(Metric):
    value,name = 0.,'never'

def mistakes(folder):
    "Messages of the errors that all processes make together"
    def message(f):
        with pytest.raises(CellsegError) as e: f()
        return str(e.value)
    def odd_metric():
        learn = learner(folder, 'odd', 2); learn.metrics = [Never()]; learn.fit(1)
    def other_seed(): learner(folder, 'seeds', 2, seed=rank_distrib()).fit_fast(1)
    def loss_is_nan(): learner(folder, 'nan', 2).fit_fast(2, loss_func=lambda p,t: p.mean()*(float('nan') if rank_distrib() else 1.))
    found = [message(f) for f in (odd_metric, other_seed, loss_is_nan, lambda: learner(folder, 'few', 12), lambda: learner(folder, 'sync', 2).distribute(sync_bn=True))]
    assert all_ranks(found)[0]==all_ranks(found)[1]
    return found

def alone(folder):
    "Outside of training each process works for itself, here only rank 0"
    learn = learner(folder, 'alone', 2)
    n = 0
    if not rank_distrib():
        with learn.no_bar(): learn.validate(); n = len(learn.get_preds()[0])
    return from_rank0(lambda: n)

def everything(folder):
    print('rank', rank_distrib(), 'of', num_distrib())
    threads = torch.get_num_threads()
    torch.set_num_threads(1) # as torchrun has it below: sums in another order would be rounded in another way
    return dict(threads=threads, grads=first_gradients(folder, 'g2', 3), whole=whole_training(folder, 'whole'), local=local_training(folder), mistakes=mistakes(folder), alone=alone(folder))

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    save_fields(simulate_fields(folder/'data', 3, shape=(96,128), confluence=.6).assign(fold=[0,1,2]), folder/'data'/'fields.csv')
    return folder

@pytest.fixture(scope='module')
def two(folder):
    torch.set_num_threads(4)
    try: return launch(everything, 2, folder)
    finally: torch.set_num_threads(1)

def test_gradients_are_those_of_one_process(folder, two):
    "Two processes with batches of 3 against one with batches of 6, in double precision"
    one,other = first_gradients(folder, 'g1', 6),first_gradients(folder, 'g0', 3)
    assert one.dtype==torch.float64 and one.abs().max()>1e-3
    assert (two['grads']-one).abs().max()<1e-9
    assert (other-one).abs().max()>1e-4 # the first three patches alone would not do

def test_processes_stay_equal(two):
    assert two['threads']==2 # half of the four of this process
    assert len(two['whole']['equal'])==4 and all(all(e) for e in two['whole']['equal'])

def test_patches_are_shared_out(folder, two):
    "Nobody's patches are another's; all together are those of a single process, epoch for epoch"
    watch = Watch()
    with_dropout(folder, 'single').fit_fast(4, cbs=[watch])
    for one,(a,b) in zip(watch.patches, two['whole']['patches'], strict=True):
        assert len(a)==len(b)==4 and not set(a) & set(b)
        assert sorted(a+b)==sorted(one[0])
    assert len({tuple(map(tuple, p[0])) for p in watch.patches})==4 # other patches in every epoch

def test_random_states_differ_where_they_should(two):
    a,b = two['whole']['rngs']
    assert a[:2]==b[:2] and a[2]!=b[2] # drawing and moving; turning
    a,b = two['whole']['dropout']
    assert a!=b

def test_dice_in_the_history_is_that_of_all_patches(folder, two):
    h = pd.read_csv(folder/'whole'/'history.csv')
    learn = with_dropout(folder, 'check')
    learn.model.load_state_dict(load_file(folder/'whole'/'best.safetensors'))
    with learn.no_bar(): scores = learn.validate()
    best = h.iloc[h.dice[::-1].idxmax()]
    assert list(scores[1:])==pytest.approx(best[['dice','dice_micro','dice_background','dice_cytoplasm','dice_nucleus']].tolist(), abs=1e-12, nan_ok=True)
    assert two['alone']==len(learn.dls.valid_ds)

def test_weights_are_averaged_every_second_step(two):
    before,after,equal = two['local']
    assert len(before)==10 and all(all(e) for e in equal)
    for i,((a,b),(c,d)) in enumerate(zip(before, after)):
        assert not torch.equal(a, b) # each made its own step
        if i%5 in (1,3): assert torch.equal(c, d) and torch.allclose(c, (a+b)/2, atol=1e-7)
        else: assert torch.equal(a, c) and torch.equal(b, d)

def test_mistakes_are_explained(two):
    odd,seeds,nan,few,sync = two['mistakes']
    assert "never can't be summed over processes" in odd
    assert 'the processes have different fields, folds, seeds or batch sizes' in seeds
    assert 'the loss became nan in epoch 0, batch 0' in nan # of rank 1 alone, but both stop
    assert '1 batches an epoch are too few for 2 processes' in few
    assert 'sync_bn needs GPUs' in sync

def fails_in_rank_1(error):
    if rank_distrib(): raise error
    time.sleep(600)

def test_an_error_in_one_ends_both():
    start = time.time()
    with pytest.raises(RuntimeError, match='process 1 of 2 ended with ZeroDivisionError: nothing to divide\n') as e: launch(fails_in_rank_1, 2, ZeroDivisionError('nothing to divide'))
    assert time.time()-start<120
    assert 'in fails_in_rank_1' in str(e.value) # where it happened
    assert not [p for p in psutil.Process().children(recursive=True) if '_be_rank' in ' '.join(p.cmdline())]

def waits(folder):
    (folder/f'waits-{rank_distrib()}').write_text(str(os.getpid()))
    time.sleep(600)

def test_interrupt_ends_all(folder):
    old = signal.signal(signal.SIGINT, signal.default_int_handler) # a shell lets what it starts in the background ignore interrupts
    def interrupt():
        while len(list(folder.glob('waits-*')))<2: time.sleep(.1)
        time.sleep(.5); os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt): launch(waits, 2, folder)
    finally: signal.signal(signal.SIGINT, old)
    assert not any(psutil.pid_exists(int(p.read_text())) for p in folder.glob('waits-*'))

def kill_when(n_epochs, folder, p):
    "End a program and all it has started, by SIGKILL, after so many epochs"
    history,until = folder/'killed'/'history.csv',time.time()+200
    while p.poll() is None and time.time()<until and not (history.exists() and len(pd.read_csv(history))>=n_epochs): time.sleep(.05)
    assert p.poll() is None and time.time()<until, 'ended before it could be killed'
    for q in [*psutil.Process(p.pid).children(recursive=True),psutil.Process(p.pid)]: q.kill()
    p.wait()

def test_killed_and_continued(folder, two):
    "Started by torchrun, killed in the second or third epoch, continued by `launch`"
    with open(folder/'torchrun.log', 'w') as log:
        p = subprocess.Popen([sys.executable,'-m','torch.distributed.run','--standalone','--nproc-per-node','2',__file__,str(folder)], env=os.environ | {'OMP_NUM_THREADS':'1'}, stdout=log, stderr=log)
    kill_when(1, folder, p)
    assert 1<=len(pd.read_csv(folder/'killed'/'history.csv'))<4
    launch(continued, 2, folder)
    h1,h2 = (pd.read_csv(folder/n/'history.csv').drop(columns='seconds') for n in ('whole','killed'))
    assert h1.equals(h2)
    a,b = (torch.load(folder/n/'checkpoint.pt') for n in ('whole','killed'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    assert all(torch.equal(x['exp_avg_sq'], y['exp_avg_sq']) for x,y in zip(a['opt']['state'].values(), b['opt']['state'].values()))
    assert json.dumps([r['data'] for r in a['random']])==json.dumps([r['data'] for r in b['random']])
    with pytest.raises(CellsegError, match=r'processes 2 \(here: 1\)'): continued(folder)

class Slow(Callback):
    "Leaves time to be killed"
    def before_epoch(self): time.sleep(1)

def continued(folder, cbs=()): with_dropout(folder, 'killed').fit_fast(4, resume=True, cbs=cbs)

def test_launch_from_a_notebook():
    "The function is defined in the notebook; what rank 0 prints appears under the cell at once, and so does an error of another"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in ('''
from cellseg.core import CellsegError
from cellseg.distributed import launch
import os,time
from pathlib import Path
n = 7
def f(folder):
    said = Path(os.environ['CELLSEG_LAUNCH'])/'said'
    if os.environ['RANK']=='0': print('hello from one of', os.environ['WORLD_SIZE']); said.touch()
    else:
        while not said.exists(): time.sleep(.1)
        time.sleep(1)
        raise CellsegError(f'field {n} is missing')
    time.sleep(600)
''', 'launch(f, 2, "data")')])
    with pytest.raises(CellExecutionError): NotebookClient(nb, timeout=200, kernel_name='python3').execute()
    text = ''.join(o.text for o in nb.cells[1].outputs if o.get('name')=='stdout')
    assert text=='hello from one of 2\n'
    assert [(o.ename,o.evalue) for o in nb.cells[1].outputs if o.output_type=='error']==[('CellsegError','process 1 of 2: field 7 is missing')]

def test_command_line(folder, cellseg):
    "`cellseg train` in two processes: one run, written once; other numbers of processes and GPUs that are not there are refused"
    args = ('train', folder/'data'/'fields.csv', '--out', folder/'cli', '--size', 32, '--batch', 2, '--patches', 8, '--epochs', 1, '--sync-every', 2)
    code,out,err = cellseg(*args, '--processes', 2)
    assert code==0, err
    run = Run(folder/'cli')
    assert run.finished and (run.config['processes'],run.config['sync_every'])==(2,2) and set(run.scores().field)==set(run.fields.field[run.fields.fold==0])
    assert out.count('epoch 0')==1 and out.count('Dice on 1 held-out fields')==1 and (folder/'cli'/'report.html').exists()
    when = (folder/'cli'/'config.json').stat().st_mtime_ns
    code,out,err = cellseg(*args, '--processes', 2)
    assert code==0 and 'epoch 0' not in out and (folder/'cli'/'config.json').stat().st_mtime_ns==when # it was finished
    code,out,err = cellseg(*args)
    assert code==2 and 'its processes is 2, here 1' in err
    n = torch.cuda.device_count()
    code,out,err = cellseg(*args, '--gpus', n+1)
    assert code==2 and f'{n+1} GPUs were asked for, but this machine has {n}' in err

@pytest.mark.skipif(torch.cuda.device_count()<2, reason='needs two GPUs')
def test_two_gpus(folder):
    def f(): return str(learner(folder, 'gpus', 2).dls.device),from_rank0(lambda: 1)
    assert launch(f, 2)==('cuda:0',1)
    launch(lambda: learner(folder, 'gpus', 2).fit_fast(2), 2)
    assert len(pd.read_csv(folder/'gpus'/'history.csv'))==2
    with pytest.raises(CellsegError, match='GPUs were asked for'): launch(f, torch.cuda.device_count()+1)

if __name__=='__main__': continued(Path(sys.argv[1]), [Slow()])
