"""Microseconds to draw a class-balanced patch of 224 px and cut it from image and label of a 1440x1920 field, against MONAI: python tests/benchmarks/sampling.py [--fields 8] [--turns 20]

Needs pip install monai. All cut views of arrays that are in memory, from fields drawn at random. MONAI gets what it is fastest with: arrays of numpy, images in float32, no metadata. A call of it takes one field, so twelve
patches of a call come from one field: another, easier task. It knows a fast form, too: pixels of each class listed beforehand (8 bytes a pixel of the field, here about 22 MB for each).
"""
import argparse, tempfile
import numpy as np
from cellseg.data import FieldStore
from cellseg.sampling import PatchSampler
from cellseg.simulate import simulate_fields
from common import in_turns,load,machine,row,show

SIZE,BATCH = 224,12

def monai_forms(imgs, lbls, rng):
    "Functions that draw and cut with RandCropByLabelClassesd: (pixels listed beforehand?, patches a call) → function"
    from monai.data import set_track_meta
    from monai.transforms import ClassesToIndicesd,RandCropByLabelClassesd
    set_track_meta(False)
    items = [dict(image=i.astype(np.float32), label=l[None]) for i,l in zip(imgs, lbls)]
    listed = [ClassesToIndicesd('label', num_classes=3)(d) for d in items]
    crop = lambda n,key=None: RandCropByLabelClassesd(['image','label'], 'label', (SIZE,SIZE), ratios=[1,1,1], num_classes=3, num_samples=n, indices_key=key)
    def form(source, f): return lambda: f(source[rng.integers(len(source))])
    return {(fast,n):form(listed if fast else items, crop(n, 'label_cls_indices' if fast else None)) for fast in (False,True) for n in (1,BATCH)}

def listing(label, classes, rng):
    "Choose a class, list its pixels, choose one"
    where = np.flatnonzero(label==rng.integers(classes)); return where[rng.integers(len(where))]

def compare_cuts(store, turns):
    "Rows: drawing and cutting, ours and MONAI's"
    rng,n = np.random.default_rng(0),len(store)
    imgs,lbls = [np.array(store.image(i)) for i in range(n)],[np.array(store.label(i)) for i in range(n)]
    s,on_disc = PatchSampler(lbls, SIZE),PatchSampler([store.label(i) for i in range(n)], SIZE)
    def cut(k): return [(imgs[f][:,r:r+SIZE,c:c+SIZE],lbls[f][r:r+SIZE,c:c+SIZE]) for f,r,c,_ in s.draw(k).tolist()]
    def stored(k): return [(store.image_patch(p, SIZE),store.label_patch(p, SIZE)) for p in on_disc.draw(k)]
    fs = {(f,k):lambda f=f,k=k: f(k) for f in (cut,stored) for k in (1,BATCH)} | monai_forms(imgs, lbls, rng)
    us = {k:1e6*t/k[1] for k,t in in_turns(fs, turns, calls=10).items()} # of one patch
    one,many,fed = us[cut,1],us[cut,BATCH],us[stored,BATCH]
    line = lambda what,o,p,wanted='': row(f'draw and cut a patch, {what}', o, p, 'µs', p/o, wanted)
    return [line(f'{BATCH} a call, any fields; MONAI 1 a call', many, us[False,1], '>= 100'), line('1 a call; MONAI 1 a call', one, us[False,1], '>= 100'),
        line(f'{BATCH} a call; MONAI {BATCH} a call of one field', many, us[False,BATCH]), line(f'{BATCH} a call; MONAI 1 a call, pixels listed beforehand', many, us[True,1]),
        line(f'{BATCH} a call; MONAI {BATCH} a call of one field, pixels listed beforehand', many, us[True,BATCH]),
        line(f'copied from disc maps and normalised by FieldStore, {BATCH} a call; MONAI 1 a call, a view', fed, us[False,1])]

def compare_draws(lbls, turns):
    "Rows: drawing alone, against listing all pixels of the class at every draw"
    rare = np.zeros_like(lbls[0]); rare.flat[np.random.default_rng(0).choice(rare.size, rare.size//100_000, replace=False)] = 1
    rng,rows = np.random.default_rng(0),[]
    for name,ls,k in (('simulated cells',lbls,3), ('a class of 1 pixel in 100,000',[rare]*len(lbls),2)):
        s = PatchSampler(ls, SIZE)
        t = {k:1e6*v for k,v in in_turns(dict(ours=lambda: s.draw(BATCH), peer=lambda: listing(ls[rng.integers(len(ls))], k, rng)), 3*turns).items()}
        rows.append(row(f'draw a patch, {name}; listing pixels', t['ours']/BATCH, t['peer'], 'µs', t['peer']*BATCH/t['ours']))
    return rows

def rows(fields=8, turns=20):
    with tempfile.TemporaryDirectory() as d:
        store = FieldStore(simulate_fields(d, fields))
        return compare_cuts(store, turns)+compare_draws([np.array(store.label(i)) for i in range(fields)], turns)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument('--fields', type=int, default=8); p.add_argument('--turns', type=int, default=20)
    show(rows(**vars(p.parse_args()))); print(f'{machine()}; {load()}')
