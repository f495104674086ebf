"""Time of a class-balanced draw, against listing all pixels of the class for every draw.

python tests/benchmarks/sampling.py [--fields 8]
"""
import argparse, time
import numpy as np
from cellseg.sampling import PatchSampler
from cellseg.simulate import simulate_field

def median_us(f, n=2000):
    "Median time of `f`, µs"
    times = []
    for _ in range(n): t = time.perf_counter(); f(); times.append(time.perf_counter()-t)
    return np.median(times)*1e6

p = argparse.ArgumentParser(); p.add_argument('--fields', type=int, default=8); n = p.parse_args().fields
labels = [simulate_field(seed=i).label for i in range(n)]
rare = np.zeros_like(labels[0]); rare.flat[np.random.default_rng(0).choice(rare.size, rare.size//100_000, replace=False)] = 1
rng = np.random.default_rng(0)
def listing(label, classes):
    "Peer: choose a class, list its pixels, choose one"
    where = np.flatnonzero(label==rng.integers(classes)); return where[rng.integers(len(where))]

print(f'{n} fields of {labels[0].shape}; median of single draws')
for name,ls,k in (('paper shares', labels, 3), ('a class with 1 pixel in 100,000', [rare]*n, 2)):
    t = time.perf_counter(); s = PatchSampler(ls); setup = time.perf_counter()-t
    one,many = median_us(lambda: s.draw(1)),median_us(lambda: s.draw(100), 50)/100
    peer = median_us(lambda: listing(ls[0], k), 30)
    print(f'{name}: {one:.0f} µs a draw, {many:.0f} µs a draw of a hundred, listing pixels {peer:.0f} µs: ratio {peer/one:.0f} and {peer/many:.0f}; setting up {setup/n*1e3:.0f} ms a field')
