"What prediction needs of the machine, and that it does not depend on how the image is cut"
import json, pickle, subprocess, sys, warnings
import numpy as np, pytest, tifffile, torch
from skimage.transform import resize
from cellseg.core import seeded
from cellseg.data import field_range, normalise
from cellseg.io import image_info, read_image
from cellseg.models.registry import create_model, list_models
from cellseg.models.stream import RowMap, Stream, flow_graph
from cellseg.predict import Ensemble, Segmenter, Span, predict_fields
from cellseg.simulate import simulate_field, simulate_fields
import cellseg.learner, cellseg.models.pretrained # all networks

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

def as_trained(net, *xs):
    "Batch-norm statistics as after training, so that values are of ordinary size everywhere; all layers take part"
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = None; m.reset_running_stats()
            with torch.no_grad(): m.weight.copy_(m.weight.clamp_min(.5)) # timm starts the last of a block at 0
    with torch.no_grad(): net.train()(torch.cat(xs)); net.eval()
    return net

def a_field(rng, shape):
    img = simulate_field(shape, seed=int(rng.integers(1<<30))).brightfield
    return img,torch.from_numpy(normalise(img[None], field_range(img[None])))[None]

def in_float32(net, arch, **kwargs):
    seg = Segmenter(net, arch, inputs=('phase',), **kwargs); seg.bf16 = False # 'phase': percentiles of all pixels
    return seg

def steps_at(probs, axis):
    "Mean absolute step of the probabilities from each row (or column) to the next"
    return np.abs(np.diff(probs, axis=axis)).mean((0,3-axis))

SMALL = dict(unet={}, tiramisu=dict(layers=(2,3,3), bottom=3, first=16), deeplabv3plus={}, deeplab_timm=dict(encoder='resnet18'), unet_timm=dict(encoder='resnet18'))

STREAMED = ('unet','tiramisu','unet_timm') # strip by strip, in columns if they are too wide; else in tiles

@pytest.mark.parametrize('arch', SMALL)
def test_any_tile_gives_what_one_pass_gives(rng, arch):
    "Every network, odd sizes, several tile sizes, in float32: 1e-3 away from the border, and no seam"
    if 'timm' in arch: pytest.importorskip('timm')
    shape = (int(rng.integers(300,350)),int(rng.integers(420,470)))
    image,x = a_field(rng, shape)
    with seeded(int(rng.integers(1<<30))): net = as_trained(create_model(arch, **SMALL[arch]), x[...,:256,:192], x[...,-256:,-192:])
    seg = in_float32(net, arch)
    with torch.inference_mode(): whole = seg.model(x)[0].softmax(0).numpy()
    assert np.ptp(whole)>.05
    for tile,streamed in ((128,False),(225,False),(64,True),(128,True)):
        if not streamed: seg._known['flow'] = None
        elif arch in STREAMED: del seg._known['flow']; assert seg._flow is not None
        else: continue
        got = seg.predict(image, tile=tile).probs
        assert np.abs(got-whole)[:,8:-8,8:-8].max()<1e-3
        for axis in (1,2): np.testing.assert_allclose(steps_at(got, axis), steps_at(whole, axis), atol=2e-4)

def test_every_network_is_tested(): assert {m for m in list_models() if not m.startswith('one')} <= {*SMALL}

def test_the_seam_test_can_fail(rng):
    "Without a halo the same comparison finds the seams"
    image,x = a_field(rng, (200,300))
    with seeded(1): seg = in_float32(as_trained(create_model('unet'), x), 'unet')
    whole,columns = (seg.predict(image, **k).probs for k in ({}, dict(tile=72, overlap=0)))
    seg._known['flow'] = None
    tiles = seg.predict(image, tile=128, overlap=0).probs
    for got,axes in ((columns,(2,)),(tiles,(1,2))):
        assert np.abs(got-whole).max()>1e-2 and max(np.abs(steps_at(got, a)-steps_at(whole, a)).max() for a in axes)>1e-3

def test_strips_columns_or_tiles(rng):
    "One column while memory allows, none wider than memory allows, and strips that cover every pixel once"
    with seeded(1): seg = in_float32(create_model('unet'), 'unet', halo=56)
    for _ in range(20):
        H,W,tile = int(rng.integers(100,9000)),int(rng.integers(100,9000)),int(rng.integers(60,700))
        strips = seg._strips((H,W), tile, None)
        if strips is None: assert seg.column_bytes()*W>tile**2*seg.pixel_bytes()/2; continue # tiles, and not without need
        for spans,n in zip(strips, (H,W)):
            assert (spans[0].first,spans[-1].last)==(0,-(-n//8)*8) and all(a.last==b.first for a,b in zip(spans, spans[1:]))
        rows,cols = strips
        width,high = cols[0].stop-cols[0].start,max(r.last-r.first for r in rows)
        room,takes = tile**2*seg.pixel_bytes(),width*(seg.column_bytes()+high*seg.pixel_bytes())
        assert takes<=max(room, 168*(seg.column_bytes()+16*seg.pixel_bytes()))*1.001
        assert len(cols)==1 or W*(seg.column_bytes()+16*seg.pixel_bytes())>room*.999
        assert all(b.first-b.start>=56 and a.stop-a.last>=56 for a,b in zip(cols, cols[1:]))

@pytest.mark.parametrize('arch', STREAMED)
def test_a_stream_forgets(rng, arch):
    "What is kept stays the same from strip to strip, and is what `column_bytes` said; every row of every map is computed once"
    if 'timm' in arch: pytest.importorskip('timm')
    with seeded(int(rng.integers(1<<30))): seg = in_float32(create_model(arch, **SMALL[arch]), arch)
    step,x = seg.grid,torch.from_numpy(rng.normal(size=(1,1,1024,64))).float()
    s = Stream(seg.model, seg._flow, lambda a, b: x[:,:,a:b], 1024, step)
    made,kept = {},[]
    for m in {*s.maps.values()}:
        if isinstance(m, RowMap): m.make = lambda *args, m=m, f=m.make: (made.setdefault(m, []).append(args[-2:]), f(*args))[1]
    with torch.inference_mode():
        for a in range(0, 1024, step): s.rows(a, a+step); kept.append(s.nbytes()/64)
    assert kept[-1]==0 and max(kept[:len(kept)//2])<1.3*seg.column_bytes() and min(kept[1:len(kept)//2])>seg.column_bytes()/1.3
    for m,parts in made.items(): assert parts[0][0]==0 and parts[-1][1]==m.height and all(a[1]==b[0] for a,b in zip(parts, parts[1:]))

def test_what_cannot_be_streamed():
    "Image pooling, attention over channels, batch norm over a group, a transposed convolution of another kind, wrong axes of a join"
    n = torch.nn
    class Join(n.Module):
        def __init__(self, axis): super().__init__(); self.conv,self.axis = n.Conv2d(1, 1, 1),axis
        def forward(self, x): return torch.cat([x,self.conv(x)], self.axis)
    for net in (n.AdaptiveAvgPool2d(1), n.GroupNorm(1, 1), n.ConvTranspose2d(1, 1, 2, 2), n.MaxPool2d(2, ceil_mode=True), n.Conv2d(1, 1, 3, padding='same'), n.Conv2d(1, 1, 3, padding=1, padding_mode='reflect'), Join(2)):
        assert flow_graph(n.Sequential(n.Conv2d(1, 1, 1), net)) is None
    assert flow_graph(Join(1)) is not None

@pytest.mark.parametrize('layer', [dict(kernel_size=3, padding=1), dict(kernel_size=7, stride=2, padding=3), dict(kernel_size=3, padding=4, dilation=4), dict(kernel_size=5), dict(kernel_size=1, stride=2), dict(kernel_size=3, stride=2, padding=1)])
def test_every_kind_of_layer(rng, layer):
    "Convolution and pooling of any kernel, stride, padding and dilation; a residual; a rectifier that must not change what others read"
    n = torch.nn
    class Net(n.Module):
        def __init__(self):
            super().__init__()
            self.first,self.relu,self.same,self.norm = n.Conv2d(1, 4, 3, padding=1),n.ReLU(inplace=True),n.Identity(),n.BatchNorm2d(4)
            self.layer,self.pool = n.Conv2d(4, 6, **layer),n.MaxPool2d(3, 2, 1)
        def forward(self, x):
            a = self.first(x)
            b = self.same(a)
            y = self.relu(self.norm(b))+a
            y += b
            return self.pool(self.relu(self.layer(y)))
    with seeded(int(rng.integers(1<<30))): net = Net().eval(); net.norm.weight.data.uniform_(.5, 2); net.norm.bias.data.normal_()
    x = torch.from_numpy(rng.normal(size=(1,1,96,40))).float()
    with torch.inference_mode():
        want = net(x)
        s = Stream(net, flow_graph(net), lambda a, b: x[:,:,a:b], 96, int(rng.integers(1,40)))
        cuts = [0,*sorted(rng.choice(np.arange(1, want.shape[2]), 3, replace=False).tolist()),want.shape[2]]
        torch.testing.assert_close(torch.cat([s.rows(a, b) for a,b in zip(cuts, cuts[1:])], 2), want, rtol=1e-4, atol=1e-5)

def test_a_segmenter_can_be_sent_to_another_process(rng):
    image,x = a_field(rng, (200,264))
    with seeded(1): seg = in_float32(as_trained(create_model('unet'), x), 'unet')
    a = seg.predict(image, tile=100).probs # measured and traced
    again = pickle.loads(pickle.dumps(seg)); again.bf16 = False
    np.testing.assert_allclose(again.predict(image, tile=100).probs, a, atol=1e-5)

def test_nothing_is_unjudged_without_brightfield(rng):
    "Bright blobs on a dark ground are no bubbles where the input is fluorescence"
    y,x = np.mgrid[:160,:200]
    image = rng.normal(5, 1, (160,200))+sum(200*np.exp(-((y-a)**2+(x-b)**2)/200) for a,b in rng.integers(20,140,(6,2)))
    with seeded(0): net = create_model('unet')
    assert not (Segmenter(net, 'unet', inputs=('gfp',), pixel_size=.5).predict(image, artefacts=True).label==255).any()
    seg = Segmenter(create_model('unet', n_in=2), 'unet', inputs=('gfp','brightfield'), pixel_size=.5)
    field = simulate_field((400,500), seed=2, confluence=.6, bubbles=1).brightfield
    np.testing.assert_array_equal(seg.unjudged(np.stack([field*0,field])), Segmenter(net, 'unet', pixel_size=.5).unjudged(field))
    assert seg.unjudged(np.stack([field*0,field])).any()

def test_image_pooling_takes_the_mean_of_the_whole(rng):
    "What happens far from a tile reaches it through DeepLabv3+'s image pooling"
    image,x = a_field(rng, (160,640))
    with seeded(1): seg = in_float32(as_trained(create_model('deeplab_timm', encoder='resnet18') if 'deeplab_timm' in list_models() else create_model('deeplabv3plus'), x[...,:320], x[...,320:]), 'deeplabv3plus')
    span,other = field_range(image[None]),image.copy()
    other[:,520:] = np.roll(other[:,520:], 40, 0)**2/other.mean()
    a,b = ([p for _,_,p in seg.tiles(i, tile=128)] for i in (image,other))
    assert np.abs(a[0]-b[0]).max()>1e-6 and all(np.isfinite(p).all() for p in a)

@pytest.mark.parametrize('kind', ('npy','tiff','zarr'))
def test_an_image_on_disc_is_read_in_parts(tmp_path, rng, kind):
    "Neither a memory map nor a Zarr array is ever read as a whole, and the answer is that for the array in memory"
    image = a_field(rng, (700,331))[0]
    if kind=='npy': np.save(tmp_path/'a.npy', image); stored = np.load(tmp_path/'a.npy', mmap_mode='r')
    if kind=='tiff': tifffile.imwrite(tmp_path/'a.tif', image); stored = tifffile.memmap(tmp_path/'a.tif', mode='r')
    if kind=='zarr': zarr = pytest.importorskip('zarr'); stored = zarr.create_array(tmp_path/'a.zarr', data=image, chunks=(128,128))
    asked = []
    class Watched:
        shape,ndim = stored.shape,2
        def __getitem__(self, key): out = stored[key]; asked.append(out.size); return out
    with seeded(1): seg = in_float32(create_model('unet'), 'unet', halo=16)
    assert seg.predict(Watched(), tile=160).probs.shape==(3,700,331)
    assert sum(asked[1:])<3*image.size and max(asked[1:])<=160*160 # the first is for the percentiles: at most 8 million pixels
    np.testing.assert_array_equal(seg.predict(stored, tile=160).probs, seg.predict(image, tile=160).probs)

def test_percentiles_of_a_large_image_come_from_a_part_of_it():
    class Large: # 40 000 x 30 000 pixels that exist only when asked for
        shape,ndim = (40_000,30_000),2
        def __getitem__(self, key): r,c = (np.arange(n, dtype=np.float32)[k] for n,k in zip(self.shape, key[-2:])); asked.append(len(r)*len(c)); return r[:,None]+c
    asked = []
    seg = in_float32(create_model('unet'), 'unet', halo=16); seg.memory = 2e7
    rows,cols,p = next(seg.tiles(Large()))
    assert max(asked)<8.1e6 and p.shape==(3,rows.stop,cols.stop)
    asked.clear(); full = np.add.outer(np.arange(1500.), np.arange(2900.)).astype(np.float32)
    r = seg._reader(full, 'a')(Span(0,64,0,64), Span(0,64,0,64))
    np.testing.assert_array_equal(r, normalise(full[None,:64,:64], field_range(full[None])))

def test_flips_turn_with_the_image(rng):
    "The mean over 8 turns commutes with a turn of the image, also in tiles and with a staged network"
    image,x = a_field(rng, (224,160))
    for arch in ('unet','deeplabv3plus'):
        with seeded(2): seg = in_float32(as_trained(create_model(arch), x[...,:112,:], x[...,112:,:]), arch)
        one = seg.predict(image, flips=True, tile=128).probs
        np.testing.assert_allclose(seg.predict(np.rot90(image), flips=True).probs, np.rot90(one, 1, (1,2)), atol=1e-3)
        assert np.abs(one-seg.predict(image).probs).max()>1e-4
        np.testing.assert_allclose(one.sum(0), 1, atol=1e-5)

def test_temperature(tmp_path, rng):
    "p^(1/T), renormalised, for one and for several; kept in the file; files of before have none"
    image,x = a_field(rng, (96,112))
    with seeded(2): one,two = (in_float32(as_trained(create_model('unet'), x), 'unet') for _ in range(2))
    def soft(p, t): q = p**(1/t); return q/q.sum(0)
    p,q = one.predict(image).probs,two.predict(image).probs
    both = Ensemble([one,two], temperature=3.)
    np.testing.assert_allclose(both.predict(image).probs, soft((p+q)/2, 3), atol=1e-5)
    one.temperature = 2.
    np.testing.assert_allclose(one.predict(image).probs, soft(p, 2), atol=1e-5)
    one.save(tmp_path/'a'); both.save(tmp_path/'b')
    again = Segmenter.load(tmp_path/'a'); assert (again.temperature,again._halo)==(2.,one.halo)
    assert Segmenter.load(tmp_path/'b').temperature==3.
    old = json.loads((tmp_path/'a'/'segmenter.json').read_text()); del old['temperature'],old['halo']
    (tmp_path/'a'/'segmenter.json').write_text(json.dumps(old))
    assert Segmenter.load(tmp_path/'a').temperature==1. and Segmenter.load(tmp_path/'a').halo==one.halo

def test_other_pixel_size(tmp_path, rng):
    "More than 10 %: a warning that says what to do, or the image is rescaled; a table's images say their own size"
    image = a_field(rng, (120,160))[0]
    with seeded(2): seg = in_float32(create_model('unet'), 'unet', pixel_size=.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for size in (None,.5,.46,.54): seg.predict(image, pixel_size=size)
        scaled = seg.predict(image, pixel_size=1., rescale=True)
    with pytest.warns(UserWarning, match='a.tif: its pixels are 1 µm, those of the training images were 0.5 µm.*rescale=True'): seg.predict(image, pixel_size=1., name='a.tif')
    assert scaled.probs.shape==(3,120,160)
    twice = seg.predict(resize(image, (240,320), order=1, anti_aliasing=False)).probs # an independent resizing
    np.testing.assert_allclose(scaled.probs, twice.reshape(3,120,2,160,2).mean((2,4)), atol=2e-2)
    seg.inputs = ('brightfield',)
    fields = simulate_fields(tmp_path/'data', 1, shape=(120,160), pixel_size=1.)
    with pytest.warns(UserWarning, match='rescale=True'): predict_fields(fields, seg, tmp_path/'a', progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); done = predict_fields(fields, seg, tmp_path/'b', progress=False, rescale=True, flips=True)
    assert read_image(done.prediction[0]).shape==(120,160)
    assert np.isclose(image_info(done.prediction[0]).pixel_size, 1)

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
    seen,ranges = [],P.field_range
    monkeypatch.setattr(P, 'field_range', lambda *args: seen.append(ranges(*args)) or seen[0])
    seg = Segmenter(create_model('unet'), 'unet', pixel_size=.5)
    seg.predict(read_image(spoilt.brightfield[0])[:,:])
    np.testing.assert_array_equal(seen[0], trained)
    assert abs(np.ptp(trained)/np.ptp(before)-1)<.1 and np.ptp(field_range(read_image(spoilt.brightfield[0])[None]))>1.5*np.ptp(before)
