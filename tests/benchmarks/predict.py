"""Time and peak memory of predicting a 1440x1920 image with U-Net: in tiles, and in one pass as the peer.

python tests/benchmarks/predict.py
"""
import subprocess, sys

code = '''
import resource, sys, time, numpy as np
from cellseg.core import seeded
from cellseg.models.registry import create_model
from cellseg.predict import Segmenter
with seeded(0): seg = Segmenter(create_model('unet'), 'unet')
image = np.random.default_rng(0).normal(100, 9, (1440,1920)).astype(np.float32)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6
seg.predict(image[:64,:64]); before,times = peak(),[]
for _ in range(3): t = time.perf_counter(); seg.predict(image, tile=int(sys.argv[1])); times.append(time.perf_counter()-t)
print(np.median(times), peak()-before)
'''
rows = {}
for name,tile in (('tiles of 512',512),('one pass',4096)):
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(tile)], capture_output=True, text=True, check=True).stdout
    rows[name] = [float(v) for v in out.split()]
    print(f'{name}: {rows[name][0]:.1f} s (median of 3), peak {rows[name][1]:.2f} GB above the model')
(t,m),(t1,m1) = rows.values()
print(f'tiles over one pass: {t/t1:.2f} of the time, {m/m1:.2f} of the memory')
