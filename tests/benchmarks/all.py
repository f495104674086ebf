"""Every comparison of speed and memory in one table: python tests/benchmarks/all.py [--batch 4] [--steps 5] [--quick] [--out FOLDER]

Needs pip install SimpleITK monai segmentation_models_pytorch, and a machine that does nothing else; 20 to 25 minutes on two cores. Writes benchmarks.csv, benchmarks.md and networks.csv to tests/benchmarks/results. A
ratio is how many times as fast ours is; of a training step on the loader and of memory it is ours over the other. --quick only shows that all runs: tiny sizes, figures that mean nothing, written only if --out is given.
"""
import argparse
from pathlib import Path
import augment,folds,loader,networks,sampling
from common import machine,show

def run(quick, folder, **sizes):
    "Rows of all benchmarks"
    csv_file = folder/'networks.csv' if folder else None
    parts = dict(sampling=dict(fields=2, turns=3), augment=dict(turns=2), loader=dict(batch=2, size=64, steps=3, fields=2), networks=dict(steps=1, size=64, batch=2), folds=dict(size=32, patches=16, turns=1, networks=['unet'])) if quick else dict(loader=sizes, networks=sizes)
    out = []
    for module in (sampling,augment,loader,networks,folds):
        name = module.__name__
        print(f'{name} …', flush=True)
        out += [dict(benchmark=name) | r for r in module.rows(**parts.get(name, {}), **(dict(csv_file=csv_file) if name=='networks' else {}))]
    return out

def write(rows, folder, command):
    "The table as CSV and Markdown"
    networks.write([r | dict(machine=machine(), command=command) for r in rows], folder/'benchmarks.csv')
    lines = [list(rows[0]),['---']*len(rows[0]),*[r.values() for r in rows]]
    text = f'`{command}` on {machine()}\n\n' + '\n'.join('| '+' | '.join(map(str, l))+' |' for l in lines) + '\n'
    (folder/'benchmarks.md').write_text(text, encoding='utf-8')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true'); p.add_argument('--out', type=Path)
    p.add_argument('--batch', type=int, help='patches in a training step of U-Net (4; the loader, 12)'); p.add_argument('--steps', type=int, help='training steps to take the median of')
    args = p.parse_args()
    folder = args.out or (None if args.quick else Path(__file__).parent/'results')
    if folder: folder.mkdir(parents=True, exist_ok=True)
    sizes = {k:v for k,v in dict(batch=args.batch, steps=args.steps).items() if v}
    rows = run(args.quick, folder, **sizes)
    show(rows); print(machine())
    if folder: write(rows, folder, 'python tests/benchmarks/all.py'+' --quick'*args.quick+''.join(f' --{k} {v}' for k,v in sizes.items()))
