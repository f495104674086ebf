"""Training step of each network, and of its nearest in other packages: patches/s, arithmetic, share of the machine's matrix rate, peak memory.

python tests/benchmarks/networks.py [--networks unet tiramisu deeplabv3plus] [--peers] [--batch 8] [--size 224] [--steps 5] [--forms plain channels_last bf16 both fast compiled] [--csv FILE]

Runs unchanged on a GPU. Each form of a network runs in a process of its own, so that memory is its own peak. `plain` is float32 and contiguous; `both` is channels_last and bf16; `fast` is what `seg_learner` uses:
`both` where the hardware has bf16, else channels_last alone; `compiled` is that through torch.compile. `gflop` is the arithmetic of convolutions, forwards and backwards, for one patch; `share` is of the rate of a large matrix product in the same precision,
measured after the steps (on a GPU, convolutions in float32 may use TF32, the product doesn't: then `share` can exceed 1).
As many parameters can mean very different arithmetic: a U-Net that starts at full size does five times that of one on a classifier's encoder, which halves the image first.
"""
import argparse, csv, json, subprocess, sys, time
from statistics import median
from common import load,machine,row

def _smp(kind, encoder, **kwargs):
    import segmentation_models_pytorch
    return getattr(segmentation_models_pytorch, kind)(encoder, encoder_weights=None, in_channels=1, classes=3, **kwargs)
def _basic(*features):
    from monai.networks.nets import BasicUNet
    return BasicUNet(2, 1, 3, features=features, norm='batch')

PEERS = {'smp Unet lcnet_035':      ('unet', lambda: _smp('Unet', 'tu-lcnet_035')), # nearest in parameters of all encoders
    'smp Unet vgg11_bn, 2 levels':  ('unet', lambda: _smp('Unet', 'tu-vgg11_bn', encoder_depth=2, decoder_channels=(168,64))), # starts at full size, as ours
    'MONAI BasicUNet':              ('unet', lambda: _basic(32,32,64,128,256,32)), # its own widths
    'MONAI BasicUNet, wide':        ('unet', lambda: _basic(64,64,64,128,208,64)), # as much arithmetic as ours
    'smp DeepLabV3Plus xception65': ('deeplabv3plus', lambda: _smp('DeepLabV3Plus', 'tu-xception65'))}

def create(name, checkpoint=False):
    "A network of ours, or a peer, with always the same weights"
    import cellseg.models.unet, cellseg.models.tiramisu, cellseg.models.deeplab
    from cellseg.core import seeded
    from cellseg.models.registry import create_model
    with seeded(0): return PEERS[name][1]() if name in PEERS else create_model(name, **(dict(checkpoint=True) if checkpoint else {}))

def gflop(model, size):
    "Arithmetic of convolutions and matrix products in one training step, for one patch"
    import torch
    from torch.utils.flop_counter import FlopCounterMode,conv_flop_count
    def backward(grad, x, w, bias, stride, padding, dilation, transposed, out_padding, groups, mask, **kwargs): # torch's own forgets the groups
        return sum(mask[:2])*conv_flop_count(x, w, grad, transposed)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward:backward}) as counter:
        model.to('meta')(torch.zeros(2, 1, size, size, device='meta')).sum().backward()
    return counter.get_total_flops()/2e9

def matrix_rate(device, dtype, sync):
    "TFLOP/s of a large matrix product"
    import torch
    n,times = (8192 if device=='cuda' else 2048),[]
    a,b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(8): sync(); t = time.perf_counter(); a@b; sync(); times.append(time.perf_counter()-t)
    return 2*n**3/median(times[3:])/1e12

def memory(key, device):
    "GB in use (VmRSS) or at most in use so far (VmHWM); `getrusage` would begin with the peak of the process that started this one"
    import torch
    if device=='cuda': return (torch.cuda.memory_allocated() if key=='VmRSS' else torch.cuda.max_memory_allocated())/1e9
    try: return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key))/1e6
    except FileNotFoundError: return float('nan') # not on Linux

def measure(name, form, batch, size, steps, checkpoint=False):
    "Median seconds of a training step, peak memory in GB, parameters, and arithmetic beside the machine's"
    import torch
    from cellseg.learner import has_bf16
    from cellseg.models.registry import n_params
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    compiled = form=='compiled'
    if form in ('fast','compiled'): form = 'both' if has_bf16(device) else 'channels_last'
    model,bf16 = create(name, checkpoint).to(device).train(),form in ('bf16','both')
    x,y = torch.randn(batch, 1, size, size, device=device),torch.randint(0, 3, (batch,size,size), device=device)
    if form in ('channels_last','both'): model,x = model.to(memory_format=torch.channels_last),x.to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model
    opt = torch.optim.Adam(model.parameters(), fused=device in ('cpu','cuda'))
    sync = torch.cuda.synchronize if device=='cuda' else lambda: None
    start,times = memory('VmRSS', device),[]
    for i in range(steps+2): # the first two warm up (and compile)
        sync(); t = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16): out = run(x)
        torch.nn.functional.cross_entropy(out.float(), y).backward()
        opt.step(); opt.zero_grad()
        sync(); times.append(time.perf_counter()-t)
    seconds,peak = median(times[2:]),memory('VmHWM', device)-start
    work,rate = gflop(create(name), size),matrix_rate(device, torch.bfloat16 if bf16 else torch.float32, sync)
    done = work*batch/seconds/1e3
    return dict(params=n_params(model), precision='bf16' if bf16 else 'float32', patches_per_s=batch/seconds, memory_gb=peak, gflop=work, tflops=done, matrix_tflops=rate, share=done/rate)

def run_all(networks, batches, forms, size, steps, peers=False):
    "A dict for each network, batch size and form"
    out = []
    for name in [n for m in networks for n in [m,*[p for p,(like,_) in PEERS.items() if peers and like==m]]]:
        for batch in batches:
            for form,ckpt in [(f,False) for f in forms]+[(forms[-1],True)]*(name=='tiramisu'):
                one = dict(name=name, form=form, batch=batch, size=size, steps=steps, checkpoint=ckpt)
                r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', json.dumps(one)], capture_output=True, text=True)
                if r.returncode: print(f'{name} {form}: {(r.stderr.strip().splitlines() or ["ended without a word"])[-1]}'); continue
                got = {k:float(f'{v:.3g}') if isinstance(v, float) else v for k,v in json.loads(r.stdout.splitlines()[-1]).items()}
                plain = next((o['patches_per_s'] for o in out if (o['network'],o['batch'],o['form'])==(name,batch,'plain')), None)
                ratio = got['patches_per_s']/(plain or got['patches_per_s']) if plain or form=='plain' else float('nan')
                out.append(dict(network=name, form=form+(', checkpointed' if ckpt else ''), batch=batch) | got | dict(ratio=round(ratio, 2), machine=machine()))
                print('  '.join(f'{k} {v}' for k,v in out[-1].items() if k!='machine'), flush=True)
    return out

def rows(steps=5, size=224, batch=None, large=None, csv_file=None):
    "Rows: each of ours against its nearest, in both forms; the fast form against the plain one; Tiramisu's memory. Batches of 4, of the `large` networks 2, with a GPU 12"
    import torch
    batch,large = (b or (12 if torch.cuda.is_available() else n) for b,n in ((batch,4),(large,2)))
    found = [o for n,b in (('unet',batch),('deeplabv3plus',large),('tiramisu',large)) for o in run_all([n], [b], ['plain','fast'], size, steps, peers=True)]
    if csv_file and found: write(found, csv_file)
    at,out = {(o['network'],o['form']):o for o in found},[]
    def line(what, a, b, key='patches_per_s', unit='patches/s', wanted=''):
        if a in at and b in at: out.append(row(what, at[a][key], at[b][key], unit, at[a][key]/at[b][key], wanted))
    for form in ('plain','fast'):
        for p,(n,_) in PEERS.items():
            line(f'training step of {n}, {form}; {p}', (n,form), (p,form), wanted='>= 1')
            line(f'arithmetic of {n}, {form}; {p}', (n,form), (p,form), 'tflops', 'TFLOP/s')
    for n in ('unet','deeplabv3plus','tiramisu'): line(f'training step of {n}, fast; plain', (n,'fast'), (n,'plain'))
    ckpt = 'tiramisu','fast, checkpointed'
    line('memory of a training step of tiramisu, checkpointed; not', ckpt, ('tiramisu','fast'), 'memory_gb', 'GB')
    line('training step of tiramisu, checkpointed; not', ckpt, ('tiramisu','fast'))
    return out

def write(dicts, path):
    with open(path, 'w', newline='', encoding='utf-8') as f: w = csv.DictWriter(f, dicts[0]); w.writeheader(); w.writerows(dicts)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--networks', nargs='+', default=['unet','tiramisu','deeplabv3plus']); p.add_argument('--batch', type=int, nargs='+', default=[8])
    p.add_argument('--size', type=int, default=224); p.add_argument('--steps', type=int, default=5); p.add_argument('--csv')
    p.add_argument('--peers', action='store_true', help='also the nearest networks of segmentation_models_pytorch and MONAI')
    p.add_argument('--forms', nargs='+', help='default: plain, channels_last, and where the hardware has bf16 also bf16 and both'); p.add_argument('--one', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one: print(json.dumps(measure(**json.loads(args.one)))); return
    import torch
    from cellseg.learner import has_bf16
    forms = args.forms or ['plain','channels_last']+['bf16','both']*has_bf16('cuda' if torch.cuda.is_available() else 'cpu') # emulated, a step takes minutes
    print(f'{machine()}; {args.size} px, median of {args.steps} steps; {load()}')
    found = run_all(args.networks, args.batch, forms, args.size, args.steps, args.peers)
    if args.csv and found: write(found, args.csv)

if __name__=='__main__': main()
