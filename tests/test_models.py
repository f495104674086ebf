"Every network of the registry, by the same tests: counts, any size, gradients, determinism, round trip, Keras' constants, weights from files"
import io, subprocess, sys
import numpy as np, pytest, torch
from safetensors.torch import save_file
from torch import nn
import cellseg.models.unet, cellseg.models.tiramisu, cellseg.models.deeplab, cellseg.models.pretrained
from cellseg.core import CellsegError, seeded
from cellseg.models.registry import create_model, list_models, n_params

PAPER = dict(unet=1_942_023, tiramisu=9_419_011, deeplabv3plus=41_253_023) # Table 1
NAMES = list_models()

@pytest.fixture(scope='module', params=NAMES)
def model(request):
    "Each network, with two input channels and four classes, shared by the tests of this module"
    if 'timm' in request.param: pytest.importorskip('timm')
    with seeded(0): model = create_model(request.param, n_in=2, n_out=4)
    model.arch = request.param
    return model

@pytest.fixture
def images(rng): return lambda *shape: torch.from_numpy(rng.normal(size=shape)).float()

def test_the_networks_are_there(): assert set(NAMES)>={*PAPER,'unet_timm','deeplab_timm'}

@pytest.mark.parametrize('name', PAPER)
def test_counts_of_table_1(name):
    "By `n_params`, and summed by hand over the layers by Keras' rules"
    with torch.device('meta'): model = create_model(name)
    count = 0
    for m in model.modules():
        if isinstance(m, (nn.Conv2d,nn.ConvTranspose2d)):
            count += m.kernel_size[0]*m.kernel_size[1]*m.in_channels*m.out_channels//m.groups + (m.out_channels if m.bias is not None else 0)
        if isinstance(m, nn.BatchNorm2d): count += 4*m.num_features
    assert n_params(model)==count==PAPER[name]

def test_count_of_the_public_keras_deeplab():
    with torch.device('meta'): assert n_params(create_model('deeplabv3plus', n_in=3, n_out=21, last=False))==41_258_213

@pytest.mark.parametrize('size', [(1,1), (2,70), (33,47)])
def test_any_size(model, images, size):
    with torch.no_grad(): y = model.eval()(images(2,2,*size))
    assert y.shape==(2,4,*size) and y.isfinite().all()

def test_eval_repeats_itself_and_images_of_a_batch_do_not_mix(model, images):
    x = images(3,2,24,40)
    with torch.no_grad(): a,b,alone = model.eval()(x),model(x),model(x[1:2])
    assert torch.equal(a, b)
    torch.testing.assert_close(a[1:2], alone, rtol=1e-3, atol=1e-4)

def test_every_weight_learns(model, images):
    for m in model.train().modules(): # timm starts some scales at 0, which block what lies behind them until the first step
        if isinstance(m, nn.BatchNorm2d): nn.init.uniform_(m.weight, .5, 1.5)
    y = model(images(3,2,40,33))
    (y*images(*y.shape)).sum().backward()
    for name,p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum()>0, name
    model.zero_grad()

def test_smallest_training_batch(model, images):
    "One pixel: two images train, one image is refused with a reason"
    y = model.train()(images(2,2,1,1))
    assert y.shape==(2,4,1,1) and y.isfinite().all()
    with pytest.raises(CellsegError, match='batch of 1 patch of 1x1 pixels is too small'): model(images(1,2,1,1))

def test_round_trip(model, images):
    "Weights saved, and loaded into a network that began elsewhere, give the same scores"
    file = io.BytesIO(); torch.save(model.state_dict(), file); file.seek(0)
    with seeded(1): other = create_model(model.arch, n_in=2, n_out=4).eval()
    x = images(1,2,20,20)
    with torch.no_grad():
        want,before = model.eval()(x),other(x)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), want) and not torch.equal(before, want)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_checkpointing_changes_nothing(images, dtype):
    "FC-DenseNet103: scores, gradients and running averages to the last bit, over two steps with dropout; also in bfloat16"
    data = images(2,2,1,20,36)
    def train(checkpoint):
        with seeded(3), torch.autocast('cpu', torch.bfloat16, enabled=dtype==torch.bfloat16):
            model = create_model('tiramisu', checkpoint=checkpoint)
            optimiser = torch.optim.SGD(model.parameters(), lr=.01)
            for x in data: y = model(x); optimiser.zero_grad(); y.float().square().mean().backward(); optimiser.step()
        return y,[p.grad for p in model.parameters()],model.state_dict()
    (y1,g1,s1),(y2,g2,s2) = train(False),train(True)
    assert torch.equal(y1, y2) and all(torch.equal(a, b) for a,b in zip(g1, g2))
    assert s1.keys()==s2.keys() and all(torch.equal(s1[k], s2[k]) for k in s1)
    assert all(v==2 for k,v in s2.items() if k.endswith('num_batches_tracked'))

def test_checkpointed_graph_can_be_used_twice(images):
    "Two backward passes through one graph: gradients add up, running averages stay"
    model = create_model('tiramisu', checkpoint=True, layers=(2,3), bottom=2, first=8, dropout=0)
    loss = model(images(2,1,12,12)).square().mean()
    stats = {k:v.clone() for k,v in model.named_buffers()}
    loss.backward(retain_graph=True); once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p,g in zip(model.parameters(), once): torch.testing.assert_close(p.grad, 2*g)
    assert all(torch.equal(v, stats[k]) for k,v in model.named_buffers())
    assert all(m.momentum==.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))

def test_checkpointing_survives_compilation(images):
    "Compiled (without a C++ compiler: the graph alone), scores, gradients and running averages are the same"
    x = images(2,1,12,12)
    def train(compiled):
        with seeded(4): model = create_model('tiramisu', checkpoint=True, layers=(2,), bottom=1, first=8, dropout=0)
        y = (torch.compile(model, backend='aot_eager') if compiled else model)(x); y.square().mean().backward()
        return [y, *[p.grad for p in model.parameters()], *model.state_dict().values()]
    for a,b in zip(train(False), train(True)): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('name', PAPER)
def test_keras_starting_point(name):
    "Bounds from the shapes Keras gives its kernels: (h,w,in,out), depthwise (h,w,in,1), transposed (h,w,out,in); fans are h*w times the last two"
    model = create_model(name, init='keras')
    kinds = set()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): assert (m.eps,m.momentum)==(1e-3,.01) and (m.weight==1).all() and (m.bias==0).all()
        if not isinstance(m, (nn.Conv2d,nn.ConvTranspose2d)): continue
        depthwise,transposed = m.groups>1,isinstance(m, nn.ConvTranspose2d)
        a,b = (m.in_channels,1) if depthwise else (m.out_channels,m.in_channels) if transposed else (m.in_channels,m.out_channels)
        bound = (6/(m.kernel_size[0]*m.kernel_size[1]*(a+b)))**.5
        assert m.weight.abs().max()<=bound*(1+1e-6)
        if m.weight.numel()>=1000: assert m.weight.abs().max()>.97*bound and abs(m.weight.mean())<.15*bound
        if m.bias is not None: assert (m.bias==0).all()
        kinds.add('depthwise' if depthwise else 'transposed' if transposed else 'plain')
    assert kinds==dict(unet={'plain','transposed'}, tiramisu={'plain','transposed'}, deeplabv3plus={'plain','depthwise'})[name]

def test_seed_decides_the_weights():
    for init in ('torch','keras'):
        with seeded(5): a = create_model('unet', init=init).head.weight
        with seeded(5): b = create_model('unet', init=init).head.weight
        with seeded(6): c = create_model('unet', init=init).head.weight
        assert torch.equal(a, b) and not torch.equal(a, c)

@pytest.mark.parametrize('kwargs, message', [
    (dict(name='unnet'), "no network 'unnet'; known: .*deeplabv3plus.*tiramisu.*unet"),
    (dict(name='tiramisu', n_in=0), 'at least 1 input channel, not 0'), (dict(name='tiramisu', n_in=-3), 'not -3'),
    (dict(name='deeplabv3plus', n_out=1), 'at least 2 classes, not 1'),
    (dict(name='unet', init='tensorflow'), "'torch' or 'keras', not 'tensorflow'"),
    (dict(name='unet_timm', encoder='resnet18', weights='a.pth', init='keras'), 'would overwrite the weights'),
    (dict(name='unet_timm', encoder='resnet18', weights='nowhere.pth'), 'nowhere.pth: there is no such file'),
    (dict(name='unet_timm', encoder='resnte18'), "no encoder 'resnte18'; nearest names: .*resnet18"),
    (dict(name='deeplab_timm', encoder='swin_tiny_patch4_window7_224'), "can't give features at 1/16"),
    (dict(name='unet_timm', encoder='swin_tiny_patch4_window7_224'), 'no convolutional encoder'),
])
def test_what_cannot_be_built_is_explained(kwargs, message):
    if 'encoder' in kwargs: pytest.importorskip('timm')
    with pytest.raises(CellsegError, match=message): create_model(**kwargs)

def test_empty_image(images):
    with pytest.raises(CellsegError, match='0x5 pixels is empty'): create_model('unet')(images(1,1,0,5))

@pytest.mark.parametrize('suffix', ['.pth','.safetensors'])
@pytest.mark.parametrize('encoder', ['resnet18','convnext_atto'])
def test_weights_of_an_encoder_arrive(tmp_path, images, encoder, suffix):
    "The deepest features are those of the network whose weights were saved"
    timm = pytest.importorskip('timm')
    source,file,x = timm.create_model(encoder).eval(),tmp_path/f'weights{suffix}',images(1,1,64,96)
    (save_file if suffix=='.safetensors' else torch.save)(source.state_dict(), file)
    with torch.no_grad():
        want = source.forward_features(x.expand(-1,3,-1,-1))
        grey,colour = (create_model('unet_timm', n_in=n, encoder=encoder, weights=file).eval() for n in (1,3))
        torch.testing.assert_close(colour.encoder(x.expand(-1,3,-1,-1))[-1], want)
        torch.testing.assert_close(grey.encoder(x)[-1], want, rtol=1e-3, atol=1e-3)
        deeplab = create_model('deeplab_timm', encoder=encoder, weights=file).eval()
    assert sum(torch.equal(v, w) for v,w in zip(deeplab.encoder.state_dict().values(), grey.encoder.state_dict().values()))==len(grey.encoder.state_dict())

def test_weights_of_another_encoder_are_refused(tmp_path, monkeypatch):
    timm = pytest.importorskip('timm')
    file = tmp_path/'a.safetensors'
    save_file(timm.create_model('resnet18').state_dict(), file)
    for encoder in ('resnet34','resnet26','mobilenetv3_small_050'):
        with pytest.raises(CellsegError, match=f"a.safetensors are not those of the encoder '{encoder}'"): create_model('unet_timm', encoder=encoder, weights=file)
    monkeypatch.setattr(timm.models._builder, 'load_pretrained', lambda *args, **kwargs: None) # a loader that loads nothing
    with pytest.raises(CellsegError, match='is still random'): create_model('unet_timm', encoder='resnet18', weights=file)

@pytest.mark.parametrize('suffix', ['.pth','.safetensors'])
def test_damaged_weights(tmp_path, rng, suffix):
    "Cut or overwritten at random, a file is read or refused as a file; nothing else happens"
    from cellseg.models.pretrained import read_weights
    whole,file = tmp_path/f'whole{suffix}',tmp_path/f'damaged{suffix}'
    (save_file if suffix=='.safetensors' else torch.save)(dict(a=torch.ones(20,3), b=torch.zeros(5)), whole)
    good,refused = np.frombuffer(whole.read_bytes(), np.uint8),0
    for i in range(60):
        bad = good[:rng.integers(len(good))].copy() if i%2 else good.copy()
        if not i%2: bad[rng.integers(len(bad), size=8)] = rng.integers(256, size=8)
        file.write_bytes(bad.tobytes())
        try: assert all(isinstance(v, torch.Tensor) for v in read_weights(file).values())
        except CellsegError as e: refused += 1; assert file.name in str(e)
    assert refused>=30

def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match=r"cellseg\[pretrained\]"): create_model('unet_timm')
    assert 'unet_timm' in list_models()

def test_networks_import_without_timm():
    code = "import sys; import cellseg.models.pretrained; assert not {'timm','fastai'} & set(sys.modules)"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert r.returncode==0, r.stderr
