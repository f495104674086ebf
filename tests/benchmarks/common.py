"What the benchmarks share: timing in turns, the machine's name, and the rows of their table"
import os,time
from statistics import median

def in_turns(fs, turns, calls=1, warm=3):
    "Median seconds of a call of each of `fs`, a dict of functions; in turns, so that a busy moment of the machine meets all"
    took = {k:[] for k in fs}
    for _ in range(warm+turns):
        for k,f in fs.items():
            for _ in range(calls): start = time.perf_counter(); f(); took[k].append(time.perf_counter()-start)
    return {k:median(v[warm*calls:]) for k,v in took.items()}

def row(what, ours, peer, unit, ratio, wanted=''):
    "One line of the table; `wanted` is '' or like '>= 100'"
    met = ''
    if wanted: sign,limit = wanted.split(); met = 'yes' if (ratio>=float(limit) if sign=='>=' else ratio<=float(limit)) else 'NO'
    return dict(what=what, ours=f'{ours:.4g}', peer=f'{peer:.4g}', unit=unit, ratio=f'{ratio:.3g}', wanted=wanted, met=met)

def show(rows):
    "Print rows in columns"
    lines = [list(rows[0]),*[[str(v) for v in r.values()] for r in rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for l in lines: print('  '.join(v.ljust(w) for v,w in zip(l, widths)).rstrip(), flush=True)

def machine():
    "Processor or GPU, threads, torch version"
    from cellseg.run import _environment
    e = _environment()
    return f"{e['machine']}, torch {e['versions']['torch']}"

def load(): return f'load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores'
