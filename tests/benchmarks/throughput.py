"""Images a second of each network on whole images, and the share of the time in which the GPU computes.

    python tests/benchmarks/throughput.py [--size 1440x1920] [--images 8]

Untrained networks with batch-norm statistics as after training; each image is an array in memory, its result label and probabilities in memory. Without a GPU the share is left out, and --size 512x640 --images 2 is kinder. Writes results/throughput.csv.
"""
import argparse, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from cellseg.core import seeded
from cellseg.models.registry import create_model
from cellseg.predict import Segmenter
from cellseg.simulate import simulate_field
from common import machine, load

def segmenter(arch):
    "An untrained network whose values are of ordinary size everywhere"
    with seeded(0):
        net = create_model(arch)
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None; m.reset_running_stats()
        with torch.no_grad(): net.train()(torch.randn(2, 1, 224, 224)); net.eval()
    return Segmenter(net, arch)

def measure(seg, images):
    "Seconds an image, share of them in which the GPU computes (nan without one), peak GPU memory in GB"
    gpu = seg.device.type=='cuda'
    seg.predict(images[0]) # halo, kernels
    if gpu: torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for i in images: seg.predict(i)
    took = (time.perf_counter()-start)/len(images)
    if not gpu: return took,np.nan,np.nan
    peak = torch.cuda.max_memory_allocated()/1e9
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        start = time.perf_counter(); seg.predict(images[0]); torch.cuda.synchronize(); wall = time.perf_counter()-start
    return took,sum(e.self_device_time_total for e in p.key_averages())/1e6/wall,peak

def main():
    p = argparse.ArgumentParser(); p.add_argument('--size', default='1440x1920'); p.add_argument('--images', type=int, default=8)
    args = p.parse_args()
    shape,rows = tuple(map(int, args.size.split('x'))),[]
    images = [simulate_field(shape, seed=i).brightfield for i in range(args.images)]
    for arch in ('unet','tiramisu','deeplabv3plus'):
        took,share,peak = measure(segmenter(arch), images)
        rows.append(dict(arch=arch, size=args.size, images_a_second=1/took, gpu_computes=share, gpu_memory_GB=peak, machine=f'{machine()}, {load()}', command=f'python tests/benchmarks/throughput.py --size {args.size} --images {args.images}'))
        print(f'{arch}: {1/took:.3g} images a second' + (f', the GPU computes {share:.0%} of the time, {peak:.1f} GB' if share==share else ''), flush=True)
    return pd.DataFrame(rows)

if __name__=='__main__': main().round(4).to_csv(Path(__file__).parent/'results'/'throughput.csv', index=False)
