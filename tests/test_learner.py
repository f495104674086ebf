"Training under a real interrupt, and what a hand-written loop gives"
import os, signal
import pandas as pd, pytest, torch
from fastai.callback.core import Callback
from safetensors.torch import load_file
from cellseg.data import patch_dls
from cellseg.learner import seg_learner
from cellseg.simulate import simulate_fields

@pytest.fixture
def dls(tmp_path):
    fields = simulate_fields(tmp_path/'data', 3, shape=(128,160), confluence=.6).assign(fold=[0,1,2])
    return patch_dls(fields, size=64, bs=4, n_train=8)

class Interrupt(Callback):
    "Send this process the signal of Ctrl-C, `n` times, in epoch 2"
    def __init__(self, n): self.n = n
    def before_batch(self):
        if self.training and self.epoch==2 and self.iter==0:
            for _ in range(self.n): os.kill(os.getpid(), signal.SIGINT)

def test_interrupt_keeps_what_was_learnt(dls, tmp_path):
    learn,handler = seg_learner(dls, path=tmp_path/'run'),signal.getsignal(signal.SIGINT)
    learn.fit_fast(9, cbs=[Interrupt(1)])
    assert len(pd.read_csv(tmp_path/'run'/'history.csv'))==2
    best = load_file(tmp_path/'run'/'best.safetensors')
    assert all(torch.equal(v, best[k]) for k,v in learn.model.state_dict().items())
    assert signal.getsignal(signal.SIGINT) is handler

def test_second_interrupt_stops_at_once(dls, tmp_path):
    with pytest.raises(KeyboardInterrupt): seg_learner(dls, path=tmp_path/'run').fit_fast(9, cbs=[Interrupt(2)])
    signal.signal(signal.SIGINT, signal.default_int_handler)

def test_same_seed_same_history(tmp_path):
    "Two runs with one seed on CPU in float32 agree to the last digit; another seed does not"
    fields = simulate_fields(tmp_path/'data', 3, shape=(128,160), confluence=.6).assign(fold=[0,1,2])
    def history(seed, name):
        learn = seg_learner(patch_dls(fields, size=64, bs=4, n_train=16, seed=seed), path=tmp_path/name, precision='float32', seed=seed)
        learn.fit_fast(2)
        return pd.read_csv(tmp_path/name/'history.csv').drop(columns='seconds')
    a,b,c = history(0, 'a'),history(0, 'b'),history(1, 'c')
    assert a.equals(b) and not a.equals(c)
