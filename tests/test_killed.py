"""A training killed at random moments ends as if it had never been disturbed; a full disc loses nothing

Run as a program, this file forks trainings and kills them: what was imported need not be imported again for each."""
import errno, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from safetensors.torch import load_file
from cellseg.core import CellsegError
from cellseg.data import patch_dls
from cellseg.fields import load_fields, save_fields
from cellseg.learner import seg_learner
from cellseg.run import Run, train
from cellseg.simulate import simulate_fields

EPOCHS = 8

def one_training(folder, out, slow_write=False):
    "A short training that uses every random generator: drawing, bending, dropout"
    torch.set_num_threads(1)
    if slow_write: os.fsync = lambda f: time.sleep(1) # a checkpoint is written, but has not got its name yet
    if not (file := folder/'data'/'fields.csv').exists(): save_fields(simulate_fields(folder/'data', 3, shape=(96,128), confluence=.6).assign(fold=[0,1,2]), file)
    return train(load_fields(file), folder/out, 'tiramisu', 'paper', EPOCHS, size=32, bs=2, n_train=4, n_valid=2, precision='float32')

def epochs_done(folder):
    h = folder/'killed'/'history.csv'
    return len(pd.read_csv(h)) if h.exists() else 0

def kill_and_continue(folder, kills):
    "Train in forked processes, kill so many of them at a random moment after their first epoch, and let the last one end; print what happened"
    while True:
        before,pid = epochs_done(folder),os.fork()
        if not pid: one_training(folder, 'killed', slow_write=kills%2==1); os._exit(0)
        if kills:
            while epochs_done(folder)==before and not os.waitid(os.P_PID, pid, os.WEXITED|os.WNOHANG|os.WNOWAIT): time.sleep(.01)
            time.sleep(random.uniform(0, .7)); os.kill(pid, signal.SIGKILL); kills -= 1
        status = os.waitpid(pid, 0)[1]
        if status!=signal.SIGKILL: return status
        print('killed after', epochs_done(folder), 'epochs, left half-written:', [p.name for p in (folder/'killed').glob('.*')], flush=True)

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    threads = torch.get_num_threads()
    run = one_training(folder, 'undisturbed')
    torch.set_num_threads(threads)
    return folder,run

def test_killed_runs_end_as_if_undisturbed(undisturbed):
    folder,run = undisturbed
    r = subprocess.run([sys.executable, '-W', 'ignore', __file__, str(folder), '6'], capture_output=True, text=True, timeout=600, env=os.environ | {'OMP_NUM_THREADS':'1'})
    assert r.returncode==0, r.stderr[-2000:]
    print(r.stdout)
    assert r.stdout.count('killed after')>=2
    again = Run(folder/'killed')
    assert again.finished and again.history.drop(columns='seconds').equals(run.history.drop(columns='seconds'))
    a,b = (load_file(next((r.folder/'segmenter').glob('*.safetensors'))) for r in (run,again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert again.scores().equals(run.scores())
    assert not list(again.folder.glob('*.pt')) and not list(again.folder.glob('.*')) # nothing half-written stays

def test_full_disc_stops_with_the_last_epoch_kept(undisturbed, tmp_path, monkeypatch):
    "The disc fills up while the third checkpoint is written"
    fields,sync,n = Run(undisturbed[0]/'undisturbed').fields,os.fsync,[0]
    def full(f):
        n[0] += 1
        if n[0]==3: raise OSError(errno.ENOSPC, 'No space left on device')
        sync(f)
    monkeypatch.setattr(os, 'fsync', full)
    settings = dict(epochs=4, size=32, bs=2, n_train=4, n_valid=2, precision='float32')
    with pytest.raises(CellsegError, match='disc is full'): train(fields, tmp_path/'full', **settings)
    assert len(Run(tmp_path/'full').history)==2 and not Run(tmp_path/'full').finished
    whole,onward = train(fields, tmp_path/'whole', **settings),train(fields, tmp_path/'full', **settings)
    assert onward.finished and onward.history.drop(columns='seconds').equals(whole.history.drop(columns='seconds'))

class Vanish(Callback):
    "A file is moved away in the second epoch"
    def __init__(self, path, to): self.path,self.to = path,to
    def before_epoch(self):
        if self.epoch==1: shutil.move(self.path, self.to)

def test_vanished_file(undisturbed, tmp_path):
    "A held-out image is gone when it should be predicted, and again when the same call should go on: nothing that was learnt is lost"
    fields,settings = Run(undisturbed[0]/'undisturbed').fields,dict(epochs=2, size=32, bs=2, n_train=4, n_valid=2, precision='float32')
    shutil.copy(fields.brightfield[0], tmp_path/'field.tif')
    fields.loc[0,'brightfield'] = str(tmp_path/'field.tif')
    with pytest.raises(CellsegError, match=r'field\.tif.*: 1 of 1 held-out fields could not be predicted\. The training is done and kept'):
        train(fields, tmp_path/'run', cbs=[Vanish(tmp_path/'field.tif', tmp_path/'away.tif')], **settings)
    assert len(Run(tmp_path/'run').history)==2 and not Run(tmp_path/'run').finished
    with pytest.raises(CellsegError, match=r'field\.tif'): train(fields, tmp_path/'run', **settings)
    assert (tmp_path/'run'/'checkpoint.pt').exists()
    shutil.move(tmp_path/'away.tif', tmp_path/'field.tif')
    again,whole = train(fields, tmp_path/'run', **settings),train(fields, tmp_path/'whole', **settings)
    assert again.finished and again.scores().equals(whole.scores()) and again.history.drop(columns='seconds').equals(whole.history.drop(columns='seconds'))

def test_loss_that_is_no_number(undisturbed, tmp_path):
    "Weights that have grown beyond all numbers: training stops, and what was kept of the training before is good"
    fields = Run(undisturbed[0]/'undisturbed').fields
    learn = seg_learner(patch_dls(fields, size=32, bs=2, n_train=4), path=tmp_path)
    learn.fit_fast(1)
    with torch.no_grad(): learn.model.head.weight.fill_(np.inf)
    with pytest.raises(CellsegError, match='the loss became nan in epoch 0, batch 0') as e: learn.fit_fast(1)
    assert 'Exception occured' not in str(e.value)
    assert all(v.isfinite().all() for v in load_file(tmp_path/'best.safetensors').values())
    assert all(v.isfinite().all() for v in torch.load(tmp_path/'checkpoint.pt')['model'].values())

if __name__=='__main__': sys.exit(kill_and_continue(Path(sys.argv[1]), int(sys.argv[2]))!=0)
