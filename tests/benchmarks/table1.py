"""Table 1 of the paper: its three networks under its recipe, on 170 simulated fields (153 to train on, 17 to validate) or on yours.

python tests/benchmarks/table1.py [--out table1] [--fields fields.csv] [--minutes 9] [--small] [--results FOLDER]

With `--minutes` it stops after the epoch in which the time is over; the same command goes on from there, also after being killed.
`--small` does the whole in about ten minutes on two cores: 10 small fields, patches of 64 px, few epochs.
Writes table1.csv and table1.md into `--out` whenever a network is done.
"""
import argparse, sys, time
from pathlib import Path
import pandas as pd
from fastai.callback.core import Callback
from cellseg.core import CellsegError, atomic_path
from cellseg.fields import kfold_fields, load_fields, save_fields
from cellseg.labels import label_fields
from cellseg.run import Run, summarise, train
from cellseg.simulate import simulate_fields

PAPER = dict(unet=('U-Net',1_942_023,.9102), tiramisu=('Tiramisu',9_419_011,.927), deeplabv3plus=('DeepLabv3+',41_253_023,.9395))
FULL = dict(n=170, shape=(1440,1920), folds=10, epochs=300, size=224, bs=12)
SMALL = dict(n=10, shape=(360,480), folds=5, epochs=10, size=64, bs=2, n_train=100, n_valid=20) # 500 steps; fewer are too few for Keras' slow running means of batch normalisation (momentum .99)

TOO_SHORT = ' So few steps on so small patches show that everything runs to its end, not what these networks can do.'

class OutOfTime(Exception): "The slice is over; what is done is kept"

class Slice(Callback):
    "Stop after the epoch, its checkpoint written, in which the time is over"
    order = 99
    def __init__(self, ends): self.ends = ends
    def check(self):
        if time.time()>self.ends: raise OutOfTime('the slice is over')
    def after_epoch(self): self.check()

def simulated(folder, n, shape, part, batch=10):
    "Simulated fields with labels from their fluorescence; a batch that is there is not made again"
    tables = []
    for b in range(-(-n//batch)):
        file = folder/f'{b:02d}'/'fields.csv'
        if not file.exists():
            part.check()
            t = simulate_fields(file.parent, min(batch, n-b*batch), shape, seed=b)
            t = label_fields(t.assign(field=[f'{b:02d}-{f}' for f in t.field], truth=t.label).drop(columns='label'), file.parent/'labels').drop(columns='problem')
            save_fields(t, file)
        tables.append(load_fields(file))
    return pd.concat(tables, ignore_index=True)

def row_of(run):
    "A line of the table"
    c,history = run.config,run.history
    name,_,paper = PAPER.get(c['arch'], (c['arch'],None,None))
    dice = {a:summarise(run.scores(a))['mean'] for a in run.scored}
    return dict(network=name, parameters=c['n_params']) | {f'Dice {k}':v for k,v in dice['label'].items() if k!='all'} | {'Dice':dice['label']['all'],
        'Dice against exact truth':dice['truth']['all'] if 'truth' in dice else None, 'Dice of validation patches':history.dice.max(), 'Dice in the paper':paper,
        'training minutes':c['training_seconds']/60, 'epochs':c['epochs'], 'batch':c['bs'], 'training fields':c['n_train_fields'], 'validation fields':c['n_held_out'], 'device':c['machine']}

def write_table(rows, out, command):
    "The table as CSV and Markdown"
    t = pd.DataFrame(rows).round(4)
    with atomic_path(out/'table1.csv') as p: t.to_csv(p, index=False)
    show = t.set_index('network').drop(columns='device').T
    lines = ['| | '+' | '.join(show.columns)+' |', '|---'*(len(show.columns)+1)+'|']
    for k,values in show.iterrows(): lines.append(f'| {k} | ' + ' | '.join('' if pd.isna(v) else f'{v:,.0f}' if v>1 and float(v).is_integer() else f'{v:.3f}' for v in values) + ' |')
    with atomic_path(out/'table1.md') as p: p.write_text('\n'.join([*lines, '', f'`{command}` on {", ".join(sorted(set(t.device)))}, torch {run_versions(out)}.' + TOO_SHORT*('--small' in command), '']))
    return '\n'.join(lines)

def run_versions(out):
    "Versions of torch in the runs of the table"
    return ', '.join(sorted({Run(p.parent).config['versions']['torch'] for p in out.glob('*/config.json')}))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=Path('table1')); p.add_argument('--fields', help='fields table (CSV) with labels; folds, if it has none, are made')
    p.add_argument('--minutes', type=float, default=float('inf')); p.add_argument('--small', action='store_true')
    p.add_argument('--networks', nargs='+', default=list(PAPER)); p.add_argument('--epochs', type=int); p.add_argument('--batch', type=int); p.add_argument('--results', type=Path, help='folder to copy the finished table to')
    args = p.parse_args()
    s = (SMALL if args.small else FULL) | {k:v for k,v in dict(epochs=args.epochs, bs=args.batch).items() if v}
    n,shape,folds,rows,part = s.pop('n'),s.pop('shape'),s.pop('folds'),[],Slice(time.time()+60*args.minutes)
    command = ' '.join(['python tests/benchmarks/table1.py'] + ['--small']*args.small + [f'--{k} {v}' for k,v in dict(fields=args.fields, epochs=args.epochs, batch=args.batch).items() if v])
    try:
        fields = load_fields(args.fields) if args.fields else simulated(args.out/'data', n, shape, part)
        if 'fold' not in fields: fields = kfold_fields(fields, folds)
        for arch in args.networks:
            print(arch, flush=True)
            rows.append(row_of(train(fields, args.out/arch, arch, 'paper', cbs=[part], **s)))
            table = write_table(rows, args.out, command); print(table, flush=True)
    except OutOfTime:
        print(f'{args.minutes:g} minutes are over: the same command goes on from here'); return
    except CellsegError as e: print(f'table1: {e}', file=sys.stderr); sys.exit(2)
    for f in ('table1.csv','table1.md') if args.results else ():
        with atomic_path(args.results/f.replace('table1', 'table1_small' if args.small else 'table1')) as p: p.write_text((args.out/f).read_text())

if __name__=='__main__': main()
