"""The two recipes at equal training time: Dice on held-out fields.

python tests/benchmarks/recipes.py [--minutes 4] [--fields fields.csv --classes background nucleus] [--arch unet] [--size 128] [--csv FILE]

The first epochs of each form tell how long an epoch takes; it then gets as many epochs as fit into the time, so that its schedule ends with it.
The paper's recipe is run as the paper did (float32, batches of 3, its augmentation) and, if the hardware has it, with bfloat16; ours with its defaults.
"""
import argparse, csv, tempfile
from pathlib import Path
from cellseg.core import CLASSES
from cellseg.fields import load_fields
from cellseg.learner import has_bf16
from cellseg.run import summarise, train
from cellseg.simulate import simulate_fields

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=4); p.add_argument('--arch', default='unet'); p.add_argument('--size', type=int, default=128)
    p.add_argument('--fields', help='fields table (CSV) with labels; simulated ones if left out'); p.add_argument('--classes', nargs='+', default=CLASSES); p.add_argument('--csv')
    args = p.parse_args()
    forms = {'paper, float32, batch 3':dict(recipe='paper', bs=3, precision='float32')} | ({'paper, bfloat16, batch 3':dict(recipe='paper', bs=3, precision='bf16')} if has_bf16() else {})
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        fields = load_fields(args.fields) if args.fields else simulate_fields(Path(tmp)/'data', 10, (512,640), seed=1, confluence=.7)
        for name,kw in (forms | {'fast, batch 12':dict(recipe='fast', bs=12)}).items():
            def run(epochs, folder): return train(fields, Path(tmp)/folder, args.arch, epochs=epochs, size=args.size, classes=tuple(args.classes), n_train=96, n_valid=16, **kw)
            epoch = run(2, name+' trial').history.seconds.min()
            r = run(max(1, round(args.minutes*60/epoch)), name)
            s = summarise(r.scores())['mean'].round(3).to_dict()
            rows.append(dict(recipe=name, epochs=r.config['epochs'], patches=96*r.config['epochs'], training_minutes=round(r.config['training_seconds']/60, 1)) | s | dict(arch=args.arch, machine=r.config['machine']))
            print(rows[-1], flush=True)
    if args.csv:
        with open(args.csv, 'w', newline='') as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)

if __name__=='__main__': main()
