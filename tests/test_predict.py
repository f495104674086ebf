"What prediction needs of the machine, and that it does not depend on how the image is cut"
import subprocess, sys
import numpy as np, pytest, torch
from cellseg.core import seeded
from cellseg.models.registry import create_model
from cellseg.predict import Segmenter, predict_bands
from cellseg.data import field_range, normalise
from cellseg.io import read_image

def test_memory_of_a_large_image():
    "1440x1920 pixels take less than 2 GB above the model"
    code = '''
import resource, numpy as np
from cellseg.core import seeded
from cellseg.models.registry import create_model
from cellseg.predict import Segmenter
with seeded(0): seg = Segmenter(create_model('unet'), 'unet')
image = np.random.default_rng(0).normal(100, 9, (1440,1920)).astype(np.float32)
seg.predict(image[:64,:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert seg.predict(image).label.shape==(1440,1920)
print('above', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1e6)
'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert float(r.stdout.split('above')[1])<2

def test_tiles_equal_the_whole_image(rng):
    "Away from rounding, tiles of any size give what the network gives for the whole image at once (float32)"
    with seeded(1): net = create_model('unet').eval()
    for m in net.modules(): # statistics as after training, so that values are of ordinary size everywhere
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None; m.reset_running_stats()
    image = rng.normal(size=(1,int(rng.integers(300,400)),int(rng.integers(300,400)))).astype(np.float32)
    span = field_range(image)
    x = torch.from_numpy(normalise(image, span))[None]
    with torch.no_grad():
        net.train(); net(x); net.eval()
        f = lambda t: net(t).softmax(1)
        whole = f(x)[0].numpy()
        for tile,overlap in ((256,128),(288,128),(390,192)):
            tiles = np.concatenate([p for _,p in predict_bands(f, image, span, tile, overlap)], axis=1)
            assert tiles.shape==whole.shape
            assert np.abs(tiles-whole).max()<1e-3

def test_a_memory_mapped_image_is_read_in_parts(tmp_path, rng):
    "An image on disc is never read as a whole: no slice asked for is larger than a tile"
    np.save(tmp_path/'a.npy', rng.random((1,700,300)).astype(np.float32))
    stored,asked = np.load(tmp_path/'a.npy', mmap_mode='r'),[]
    class Watched:
        shape,ndim = stored.shape,3
        def __getitem__(self, key): out = stored[key]; asked.append(out.size); return out
    def f(x): return torch.cat([x,-x], 1).softmax(1)
    got = np.concatenate([p for _,p in predict_bands(f, Watched(), np.float32([[0,1]]), 128, 32)], axis=1)
    assert got.shape==(2,700,300) and max(asked)<=128*128

def test_two_inputs_and_their_order(rng):
    with seeded(0): seg = Segmenter(create_model('unet', n_in=2), 'unet', inputs=('brightfield','phase'))
    a,b = rng.random((2,64,80))
    one,two = seg.predict(np.stack([a,b])),seg.predict(np.stack([b,a]))
    assert one.probs.shape==(3,64,80) and np.abs(one.probs-two.probs).max()>0
    with pytest.raises(ValueError, match='brightfield, phase'): seg.predict(a)

def test_training_and_prediction_map_grey_values_alike(tmp_path, monkeypatch):
    "A field with bubbles gets the same range in both, near that of the same cells without them"
    from cellseg.data import FieldStore
    from cellseg.simulate import simulate_fields
    import cellseg.predict as P
    clean,spoilt = (simulate_fields(tmp_path/str(b), 1, (500,600), seed=5, confluence=.6, pixel_size=.5, bubbles=b) for b in (0,2))
    before,trained = (FieldStore(f).ranges[0] for f in (clean,spoilt))
    seen = []
    monkeypatch.setattr(P, 'predict_bands', lambda f, image, rng, *args: seen.append(rng) or iter(()))
    seg = Segmenter(create_model('unet'), 'unet', pixel_size=.5)
    list(seg.bands(read_image(spoilt.brightfield[0])))
    np.testing.assert_array_equal(seen[0], trained)
    assert abs(np.ptp(trained)/np.ptp(before)-1)<.1 and np.ptp(field_range(read_image(spoilt.brightfield[0])[None]))>1.5*np.ptp(before)
