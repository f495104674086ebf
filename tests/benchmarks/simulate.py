"Seconds to simulate and write one 1440x1920 field on one thread: python tests/benchmarks/simulate.py [fields]"
import os
for v in ('OMP_NUM_THREADS','OPENBLAS_NUM_THREADS','MKL_NUM_THREADS'): os.environ[v] = '1' # before numpy is loaded
import sys,tempfile,time
from statistics import median
from cellseg.simulate import simulate_fields

if __name__=='__main__':
    n = int(sys.argv[1]) if len(sys.argv)>1 else 5
    for what,kwargs in {'confluent':{}, 'sparse':dict(confluence=.3), 'bubbles and lost focus':dict(bubbles=2, defocus=.2)}.items():
        took = []
        with tempfile.TemporaryDirectory() as d:
            for seed in range(n):
                start = time.perf_counter()
                simulate_fields(d, 1, seed=seed, **kwargs)
                took.append(time.perf_counter()-start)
        print(f'{what}: median {median(took):.2f} s a field, {min(took):.2f} to {max(took):.2f} s over {n} fields')
