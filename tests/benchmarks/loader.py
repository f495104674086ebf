"""U-Net's training step on batches of the real loader (fields on disc, drawing, cutting, augmentation), over the same step on one fixed batch: at most 1.05 is wanted.

python tests/benchmarks/loader.py [--batch 12] [--size 224] [--steps 10; 300 with a GPU] [--fields 3] [--augment paper default]

Both in turns: one step each, where the loader works in this process; where it has workers of its own (with a GPU), an epoch of so many steps each, or the workers would get ahead during the fixed steps. The second
figure is the time to get a batch over that of the fixed step, plus one: less noise, but blind to what loading does to the step (caches, work left to the GPU). Runs unchanged on a GPU.
"""
import argparse, tempfile, time
from statistics import median
import torch
from cellseg.augment import paper_augment
from cellseg.data import patch_dls
from cellseg.learner import kernels_and_rest,seg_learner
from cellseg.simulate import simulate_fields
from common import load,machine,row,show

def training_step(dls, folder):
    "Function of a batch that does what a step of `seg_learner` and `fit_paper` does, waiting for a GPU"
    learn = seg_learner(dls, 'unet', path=folder)
    model,device = learn.model.train().to(dls.device),dls.device.type
    opt = torch.optim.Adam([dict(params=p, weight_decay=wd) for p,wd in zip(kernels_and_rest(model), (2e-4,0.))], eps=1e-7, fused=device in ('cpu','cuda'))
    def step(x, y):
        with torch.autocast(device, torch.bfloat16, enabled=learn.precision=='bf16'): out = model(x)
        learn.loss_func(out.float(), y).backward()
        opt.step(); opt.zero_grad()
        if device=='cuda': torch.cuda.synchronize()
    return step

def forever(dl):
    "Batches, epoch after epoch"
    while True: yield from dl

def compare(fields, folder, augment, steps, batch, size):
    "Median seconds of getting a batch, of that and the step on it, and of the step on a fixed batch"
    dls = patch_dls(fields, size, batch, n_train=batch*steps, n_valid=1, batch_tfms=augment)
    step,batches = training_step(dls, folder),forever(dls.train)
    turn = steps if dls.train.fake_l.num_workers else 1
    fixed,clock,took = next(batches),time.perf_counter,[]
    for _ in range(1+max(3, steps//turn)): # the first warms up
        got,start = 0,clock()
        for _ in range(turn): t = clock(); b = next(batches); got += clock()-t; step(*b)
        fed,start = clock()-start,clock()
        for _ in range(turn): step(*fixed)
        took.append((got/turn,fed/turn,(clock()-start)/turn))
    return [median(t) for t in zip(*took[1:])]

def rows(batch=12, size=224, steps=None, fields=3, augment=('paper','default')):
    out,steps = [],steps or (300 if torch.cuda.is_available() else 10)
    with tempfile.TemporaryDirectory() as d:
        table = simulate_fields(d, fields).assign(fold=[0]+[1]*(fields-1))
        for name in augment:
            got,fed,fixed = (1e3*t for t in compare(table, d, paper_augment(size) if name=='paper' else None, steps, batch, size))
            what = f'training step on {batch} patches of the loader, augmentation: {name}; on a fixed batch'
            out += [row(what, fed, fixed, 'ms', fed/fixed, '<= 1.05'), row(f'{what} (loading and that added up)', got+fixed, fixed, 'ms', 1+got/fixed, '<= 1.05')]
    return out

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for k,v in dict(batch=12, size=224, steps=None, fields=3).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--augment', nargs='+', default=['paper','default'])
    show(rows(**vars(p.parse_args()))); print(f'{machine()}; {load()}')
