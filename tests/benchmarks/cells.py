"""How fast cells are numbered, measured and compared, and how many are found: python tests/benchmarks/cells.py [--quick] [--out FOLDER]

One thread, about 3 minutes. Writes cells.csv to tests/benchmarks/results. Peers, in the same run and on the same cells: scikit-image's `regionprops_table` with the same properties, and its watershed over the whole cell mask. The found cells
are those of exact label images of fresh simulated fields (the seed is printed), against their exact cells; and nuclei in images of two nuclei that touch. --quick only shows that all runs: small fields, written only if --out is given.
"""
import os
for v in ('OMP_NUM_THREADS','OPENBLAS_NUM_THREADS','MKL_NUM_THREADS'): os.environ[v] = '1' # before numpy is loaded
import argparse,time
from statistics import median
from pathlib import Path
import numpy as np, pandas as pd
from scipy import ndimage as ndi
from skimage.measure import regionprops_table
from skimage.segmentation import watershed
from cellseg.cells import cell_instances,cells_from,nuclei_instances
from cellseg.compare import compare_cells
from cellseg.measure import measure_cells
from cellseg.predict import Prediction
from cellseg.simulate import simulate_field
from common import load,row,show

SAME = ('label','centroid','area','perimeter','eccentricity','solidity')

def cpu_seconds(fs, turns):
    "Median processor seconds of a call of each of `fs`, in turns: on one thread the wall clock of a quiet machine, whatever else runs on this one"
    took = {k:[] for k in fs}
    for _ in range(1+turns):
        for k,f in fs.items(): start = time.process_time(); f(); took[k].append(time.process_time()-start)
    return {k:median(v[1:]) for k,v in took.items()}

def peer_measure(cells, images):
    "The same properties of cells and nuclei, and intensities of the parts, by scikit-image"
    stack = np.stack(list(images.values()), -1)
    whole = regionprops_table(cells.cells, stack, properties=(*SAME,'mean_intensity'))
    rest = regionprops_table(np.where(cells.nuclei>0, 0, cells.cells), stack, properties=('label','area','mean_intensity'))
    core = regionprops_table(cells.nuclei, stack, properties=('label','area','eccentricity','solidity','mean_intensity'))
    return whole,rest,core

def speed_rows(shape, turns, seed):
    "Seconds for a confluent field of about 500 cells"
    sim = simulate_field(shape, seed, diameter=29)
    p = Prediction(sim.label, np.stack([sim.label==k for k in range(3)]).astype(np.float32))
    images,cells = dict(dna=sim.nuclei, agp=sim.cytoplasm),cell_instances(sim.label)
    n,size = cells.cells.max(),f'{shape[0]}x{shape[1]}'
    nuclei,mask = cells.nuclei,sim.label>0
    t = cpu_seconds(dict(all=lambda: measure_cells(p, images), measure=lambda: measure_cells(p, images, cells=cells), peer=lambda: peer_measure(cells, images), grow=lambda: cells_from(nuclei, mask),
        flood=lambda: watershed(ndi.distance_transform_edt(nuclei==0).astype(np.float32), nuclei, mask=mask), compare=lambda: compare_cells(cells, sim.cells)), turns)
    yield row(f'numbering and measuring all {n} cells of {size}, two channels', t['all'], np.nan, 'CPU s', t['all'], '<= 1')
    yield row('measuring alone; peer: regionprops_table, the same properties', t['measure'], t['peer'], 'CPU s', t['peer']/t['measure'])
    yield row('growing cells from nuclei; peer: watershed over the whole mask', t['grow'], t['flood'], 'CPU s', t['flood']/t['grow'])
    yield row('comparing with the exact cells', t['compare'], np.nan, 'CPU s', np.nan)

def exact(sim, what):
    "Exact numbers, without nuclei cut off by the border to less than 12 µm², and their cells"
    nuclei = np.where(sim.label==2, sim.cells, 0)
    small = np.bincount(nuclei.ravel(), minlength=sim.cells.max()+1)<12/.345**2
    numbers = nuclei if what=='nuclei' else sim.cells
    return np.where(small[numbers], 0, numbers)

def found_rows(shape, n, rng):
    "Cells found in exact label images"
    for c in (.3,.9):
        got = [{what:compare_cells(sim.label, exact(sim, what), what) for what in ('nuclei','cells')} for sim in (simulate_field(shape, int(rng.integers(2**31)), confluence=c) for _ in range(n))]
        for what in ('nuclei','cells'):
            k = pd.DataFrame([g[what] for g in got])
            total = k.sum()
            yield row(f'{what}, confluence {c}: found at IoU .5, share of {total.n_true:.0f}', total.matched, total.n_true, what, total.matched/total.n_true, '>= .97' if what=='nuclei' else '')
            yield row(f'{what}, confluence {c}: invented; merged and split', total.invented, total.merged+total.split, what, (total.invented+total.merged+total.split)/total.n_true)
            yield row(f'{what}, confluence {c}: average precision .5 to .95; panoptic quality', k.ap.mean(), k.pq.mean(), '', k.ap.mean())

def touching(rng, n, share):
    "Images of two simulated nuclei that overlap by a share of the smaller one"
    shapes = []
    while len(shapes)<60:
        sim = simulate_field((700,900), int(rng.integers(2**31)), confluence=.4)
        true = np.where(sim.label==2, sim.cells, 0)
        shapes += [true[b]==i for i,b in enumerate(ndi.find_objects(true), 1) if b and b[0].start and b[1].start and b[0].stop<700 and b[1].stop<900 and (true[b]==i).sum()>400]
    while n:
        a,b,angle = shapes[rng.integers(len(shapes))],shapes[rng.integers(len(shapes))],rng.uniform(0, 2*np.pi)
        img = np.zeros((260,260), np.int32)
        img[130-a.shape[0]//2:,130-a.shape[1]//2:][:a.shape[0],:a.shape[1]] = a
        for r in range(100, 0, -1):
            y,x = (int(130+r*o-s//2) for o,s in zip((np.sin(angle),np.cos(angle)), b.shape))
            if min(y,x)<0 or max(y+b.shape[0],x+b.shape[1])>260: continue
            here = img[y:y+b.shape[0],x:x+b.shape[1]]
            if (b&(here==1)).sum()>=max(1, share*min(a.sum(), b.sum())): here[b&(here==0)] = 2; n -= 1; yield img; break

def touching_rows(n, rng):
    "Two nuclei that touch or overlap: parted or not; peer: pieces of the mask"
    for share in (0,.05,.1):
        imgs = list(touching(rng, n, share))
        two = np.mean([nuclei_instances(i>0).max()==2 for i in imgs])
        yield row(f'two nuclei overlapping by {share:.0%}: parted; peer: connected pieces', two, np.mean([ndi.label(i>0)[1]==2 for i in imgs]), 'share', two)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument('--quick', action='store_true'); p.add_argument('--out', type=Path); p.add_argument('--seed', type=int)
    args = p.parse_args()
    seed = args.seed if args.seed is not None else int(np.random.SeedSequence().entropy%2**31)
    rng,shape = np.random.default_rng(seed),(400,500) if args.quick else (1440,1920)
    rows = [*speed_rows(shape, 1 if args.quick else 7, seed),*found_rows(shape, 1 if args.quick else 8, rng),*touching_rows(5 if args.quick else 150, rng)]
    show(rows); print(f'seed {seed}, {load()}')
    folder = args.out or (None if args.quick else Path(__file__).parent/'results')
    if folder:
        cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), '')
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).assign(machine=f'{cpu}, one thread, {load()}', command=f"python tests/benchmarks/cells.py{' --quick'*args.quick} --seed {seed}").to_csv(folder/'cells.csv', index=False)
