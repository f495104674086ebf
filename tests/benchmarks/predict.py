"""Time, peak memory and error of predicting 1440x1920 pixels with U-Net: ours against MONAI's `sliding_window_inference`.

    python tests/benchmarks/predict.py [run folder [turns [threads]]]

The same network (that of the run folder; else untrained, with batch-norm statistics as after training), MONAI with windows of 224 pixels and an overlap of 25 %, all under `torch.inference_mode`: 'plain' is float32 as users run it, 'same' the
precision and memory format that ours uses. Each in a process of its own, in turns, so that a busy moment of the machine meets all. Memory is the peak above what is there with the model and the image loaded and the code warmed up (MONAI: one window; ours: some
strips), freed memory given back; the probabilities, 33 MB of float32, are counted for both, and for ours the label image of 3 MB. Errors are against float32 in one pass. 'ours32' is ours in float32. Writes results/predict.csv.
"""
import os, subprocess, sys, tempfile
from pathlib import Path
import numpy as np, pandas as pd

code = '''
import ctypes, sys, time, numpy as np, torch
from cellseg.core import seeded
from cellseg.data import field_range, normalise
from cellseg.learner import has_bf16
from cellseg.models.registry import create_model
from cellseg.predict import Segmenter
how,bs,folder,threads,tmp = sys.argv[1:]
torch.set_num_threads(int(threads))
image = np.load(f'{tmp}/image.npy')
x = torch.from_numpy(normalise(image[None], field_range(image[None])))[None]
if folder!='-': seg = Segmenter.load(folder)
else:
    with seeded(0): net = create_model('unet')
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None; m.reset_running_stats()
    with torch.no_grad(): net.train()(x[...,:480,:640])
    seg = Segmenter(net, 'unet')
seg.inputs = ('phase',) # the percentiles of all pixels, for both
net,bf16 = seg.model,has_bf16()
if how=='ours32': seg.bf16 = False
if how=='plain': net.to(memory_format=torch.contiguous_format)
def predictor(x):
    if how=='plain': return net(x).softmax(1)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16): y = net(x.contiguous(memory_format=torch.channels_last))
    return y.float().softmax(1)
if how in ('plain','same'): from monai.inferers import sliding_window_inference
@torch.inference_mode()
def predict():
    if how[:4]=='ours': return seg.predict(image).probs
    if how=='one': return net(x)[0].softmax(0).numpy()
    return sliding_window_inference(x, 224, int(bs), predictor, overlap=.25)[0].numpy()
with torch.inference_mode(): predictor(x[...,:224,:224])
seg.predict(image[:224])
try: ctypes.CDLL('libc.so.6').malloc_trim(0) # what is free goes back, else the peak would hide in it
except (OSError, AttributeError): pass
try: open('/proc/self/clear_refs', 'w').write('5') # forget the peak so far
except OSError: pass
def status(k): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(k))/1e3
before = status('VmRSS')
t,c = time.perf_counter(),time.process_time(); probs = predict(); t,c = time.perf_counter()-t,time.process_time()-c
peak = status('VmHWM')-before
if how=='one': np.save(f'{tmp}/one.npy', probs)
d = np.abs(probs-np.load(f'{tmp}/one.npy'))
print(t, c, peak, d.max(), d.mean(), (d.max(0)>.01).mean())
'''

def run(how, bs, folder, threads, tmp):
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, how, str(bs), folder, str(threads), tmp], capture_output=True, text=True)
    if r.returncode: sys.exit(r.stderr)
    return [float(v) for v in r.stdout.split()[-6:]]

def main(folder='-', turns=3, threads=2):
    turns,threads = int(turns),int(threads)
    from cellseg.simulate import simulate_field
    from common import machine, load
    os.environ['OMP_NUM_THREADS'] = str(threads)
    ways,names = [('ours',0),('ours32',0),*[(h,b) for h in ('plain','same') for b in (1,4,8)]],('seconds','processor seconds','MB','largest error','mean error','share of pixels off by .01')
    with tempfile.TemporaryDirectory() as tmp:
        np.save(f'{tmp}/image.npy', simulate_field((1440,1920), seed=11).brightfield)
        run('one', 0, folder, threads, tmp)
        got,now = [],ways
        for turn in range(turns):
            for h,b in now: got.append((h,b,*run(h, b, folder, threads, tmp))); print(*got[-1][:2], f'{got[-1][2]:.1f} s, {got[-1][4]:.0f} MB', flush=True)
            fastest = pd.DataFrame(got).groupby([0,1])[2].median()
            now = [('ours',0),('ours32',0),('same',fastest['same'].idxmin())] # after the first turn: MONAI at its best
    table = pd.DataFrame(got, columns=('how','windows at once',*names)).groupby(['how','windows at once'], sort=False).median()
    for k,n in (('seconds','times slower than ours'),('MB','times our memory')): table[n] = [r[k]/table.loc['ours32' if h in ('plain','ours32') else 'ours',0][k] for (h,_),r in table.iterrows()] # at the same precision
    table['machine'] = f'{machine()}, {threads} threads, {load()}'
    table['command'] = f"python tests/benchmarks/predict.py{'' if folder=='-' else ' <run folder>'}; median of {turns} (MONAI in float32 and its slower batches: once)"
    print(table.drop(columns=['machine','command']).to_string(float_format='{:.3g}'.format))
    for h,what in (('plain','float32'),('same','precision of ours')):
        for b,r in table.loc[h].iterrows(): print(f"{what}, MONAI with {b} windows at once: ours is {r['times slower than ours']:.2f} times as fast (wanted 1.5) with {1/r['times our memory']:.2f} of its memory (wanted 0.7)")
    return table

if __name__=='__main__': main(*sys.argv[1:]).round(5).to_csv(Path(__file__).parent/'results'/'predict.csv')
