"""How good and how fast labels, pair check and artefact mask are: python tests/benchmarks/labels.py [--quick] [--out FOLDER]

One thread, about 9 minutes on two cores. Writes labels.csv and labels.md to tests/benchmarks/results. Every figure is over fresh simulated fields (the seed is printed), and over the real images in ../shared/data if they are
there. Peers, in the same run: Otsu's thresholds for labels, scikit-image's `phase_cross_correlation` for shifts. --quick only shows that all runs: few small fields, written only if --out is given.
"""
import os
for v in ('OMP_NUM_THREADS','OPENBLAS_NUM_THREADS','MKL_NUM_THREADS'): os.environ[v] = '1' # before numpy is loaded
import argparse,subprocess,sys,tempfile,time,warnings
from pathlib import Path
from statistics import median
import numpy as np, pandas as pd
from scipy.ndimage import gaussian_filter,gaussian_gradient_magnitude
from skimage.filters import threshold_otsu
from skimage.registration import phase_cross_correlation
from skimage.segmentation import clear_border,watershed
from cellseg.artefacts import artefact_mask
from cellseg.core import CLASSES
from cellseg.io import read_image
from cellseg.cells import nuclei_instances
from cellseg.labels import LABEL_METHODS,fluorescence_labels,label_ceiling,label_fields
from cellseg.quality import check_pairs,field_numbers,find_shift
from cellseg.simulate import simulate_field,simulate_fields

data = Path(__file__).parents[3]/'shared'/'data'
DENSITIES = dict(confluent=15/16, sparse=.3)

def row(what, value, unit='', wanted='', fields=''):
    "One line of the table; `wanted` is '' or like '>= .97'"
    met = ''
    if wanted: sign,limit = wanted.split(); met = 'yes' if (value>=float(limit) if sign=='>=' else value<=float(limit)) else 'NO'
    return dict(what=what, value=f'{value:.4g}', unit=unit, fields=str(fields), wanted=wanted, met=met)

def dice(a, b): return 2*(a&b).sum()/max((a.sum()+b.sum()), 1)
def dices(label, truth): return [dice(label==k, truth==k) for k in range(3)]
def otsu(n, c): return np.where(c>threshold_otsu(c), 1+(n>threshold_otsu(n)), 0)

def truth_rows(rng, n, shape):
    "Dice against the exact truth, of each method and of Otsu's thresholds"
    got = {m:[] for m in (*LABEL_METHODS,'Otsu thresholds (peer)')}
    for c in DENSITIES.values():
        for _ in range(n):
            s = simulate_field(shape, rng.integers(2**31), confluence=c)
            for m in got: got[m].append(dices(otsu(s.nuclei, s.cytoplasm) if 'peer' in m else fluorescence_labels(s.nuclei, s.cytoplasm, method=m), s.label))
    for m,d in got.items():
        for k,(c,least) in enumerate(zip(CLASSES, (.97,.94,.95))):
            wanted = f'>= {least}' if m=='gmm' else ''
            yield row(f'labels, {m}: Dice of {c}, mean', np.mean(d, 0)[k], '', wanted, 2*n)
            yield row(f'labels, {m}: Dice of {c}, worst field', np.min(d, 0)[k], '', '', 2*n)

def fall_rows(rng, n, shape):
    "How Dice falls with noise, density and brightness spread"
    for name,values in dict(noise=(1,2,4,8,16), confluence=(.05,.3,.6,15/16,.97), brightness_spread=(3,10,30,100), bleed_through=(0,.1,.3)).items():
        for v in values:
            sims = [simulate_field(shape, rng.integers(2**31), **{name:v}) for _ in range(n)]
            d = np.mean([dices(fluorescence_labels(s.nuclei, s.cytoplasm), s.label) for s in sims], 0)
            for k,c in enumerate(CLASSES): yield row(f'labels, {name} {v:.3g}: Dice of {c}, mean', d[k], '', '', n)

def ceiling_rows(rng, n, shape):
    "Dice between plausible labellings"
    fields = {name:[simulate_field(shape, rng.integers(2**31), confluence=c)[1:3] for _ in range(n)] for name,c in DENSITIES.items()}
    px = {name:.345 for name in fields}
    if data.is_dir():
        fields['cellpainting_bf'],px['cellpainting_bf'] = [[read_image(data/'cellpainting_bf'/f'r03c03f03p01-ch{i}sk1fk1fl1.tiff') for i in (5,3)]],.6
        fields['nf1'],px['nf1'] = [(nuc,stain) for nuc,stain,*_ in nf1()],.645
    for name,fs in fields.items():
        g = [label_ceiling(*f, pixel_size=px[name]).groupby('class', sort=False).dice.agg(['mean','min']) for f in fs]
        for c in CLASSES:
            yield row(f'ceiling, {name}: {c}, mean over pairs of labellings', np.mean([o.loc[c,'mean'] for o in g]), '', '', len(fs))
            yield row(f'ceiling, {name}: {c}, least alike', np.min([o.loc[c,'min'] for o in g]), '', '', len(fs))

def nf1():
    "Nuclear stain, whole-cell stain, and another program's masks of nuclei and cells"
    for p in sorted((data/'nf1').glob('*_DAPI_001.tif')):
        well,site = p.name.split('_')[0],p.name.split('_')[3]
        cells = data/'nf1'/f'{well}_01_3_{site}_RFP_001_MaskCells.tiff'
        yield read_image(p),read_image(cells.with_name(cells.name.replace('_MaskCells.tiff','.tif'))),read_image(p.with_name(p.stem+'_MaskNuclei.tiff'))>0,read_image(cells)>0

def real_rows():
    "Agreement with another program, which left out what touches the border of the image; such cells of ours are left out, too"
    if not data.is_dir(): print('real images (../shared/data) are not here: their rows are left out'); return
    scores = []
    for n,c,nuclei,cells in nf1():
        label = fluorescence_labels(n, c, pixel_size=.645)
        one = nuclei_instances(label, .645)
        whole = watershed(gaussian_gradient_magnitude(np.log(gaussian_filter(c.astype(float), 1)-c.min()+5), 1), one, mask=label>0)
        counted = ~((whole>0)&(clear_border(whole)==0))
        scores.append((dice(clear_border(one)>0, nuclei), dice((label>0)&counted, cells&counted)))
    for k,(what,least) in enumerate((('nuclei',.9),('whole cells',.8))): yield row(f'labels, nf1 against another program: Dice of {what}, worst field', np.min(scores, 0)[k], '', f'>= {least}', len(scores))

def raw_shift(bf, stain): return -phase_cross_correlation(bf, stain.astype(np.float32), upsample_factor=10)[0]
def edge_shift(bf, stain): return raw_shift(*[gaussian_gradient_magnitude(o.astype(np.float32), 2) for o in (bf,stain)])

def pair_rows(rng, n, shape):
    "Shifts of up to 30 px put into simulated pairs, and pairs of different fields"
    off,strange = {k:[] for k in ('find_shift','phase_cross_correlation (peer)','phase_cross_correlation of edges (peer)')},[]
    for c in DENSITIES.values():
        last = None
        for _ in range(n):
            s,d = simulate_field([o+60 for o in shape], rng.integers(2**31), confluence=c),rng.integers(-30, 31, 2)
            cut = lambda o, d=(0,0): o[30-d[0]:30-d[0]+shape[0],30-d[1]:30-d[1]+shape[1]]
            bf,stains = cut(s.brightfield),[cut(o, d) for o in (s.nuclei,s.cytoplasm)]
            got = find_shift(bf, stains)
            for k,v in zip(off, (got[:2],raw_shift(bf, stains[1]),edge_shift(bf, stains[1]))): off[k].append(np.hypot(*(np.array(v)-d)))
            if last is not None: strange.append(find_shift(last, stains).confidence)
            last = bf
    for k,v in off.items(): yield row(f'pairs, {k}: share within 1 px', np.mean(np.array(v)<=1), '', '>= .95' if 'peer' not in k else '', 2*n)
    yield row('pairs: highest confidence of stains of another field (.8 is believed)', max(strange), '', '<= .8', len(strange))

def real_pair_rows():
    "Shift of the registered real field, and how well shifts put into it are found"
    if not data.is_dir(): return
    bf,n,c = [read_image(data/'cellpainting_bf'/f'r03c03f03p01-ch{i}sk1fk1fl1.tiff') for i in (1,5,3)]
    base = find_shift(bf, [n,c])
    yield row('pairs, cellpainting_bf: shift found in the registered field', np.hypot(*base[:2]), 'px', '<= 2', 1)
    ways = {'find_shift':lambda b, ss: find_shift(b, ss)[:2], 'phase_cross_correlation (peer)':lambda b, ss: raw_shift(b, ss[-1]), 'phase_cross_correlation of edges (peer)':lambda b, ss: edge_shift(b, ss[-1])}
    fields = {'cellpainting_bf':(bf,[n,c]), **{f'brifiseg {v}':(read_image(data/'brifiseg'/f'A549_00{v}_BF.tif'),[read_image(data/'brifiseg'/f'A549_00{v}_nuclei.tif')>0]) for v in range(1, 6)}}
    for k,f in ways.items():
        worst = {name:max(_put_in(f, *o, d) for d in ((7,-12),(-25,4),(18,30))) for name,o in fields.items()}
        yield row(f'pairs, cellpainting_bf, {k}: error of a shift put in, worst of 3', worst.pop('cellpainting_bf'), 'px', '<= 2' if 'peer' not in k else '', 1)
        yield row(f'pairs, brifiseg, {k}: error of a shift put in, against the shift found without it, worst of 3', max(worst.values()), 'px', '<= 2' if 'peer' not in k else '', len(worst))
    for v in range(1, 6):
        s = find_shift(read_image(data/'brifiseg'/f'A549_00{v}_BF.tif'), read_image(data/'brifiseg'/f'A549_00{v}_nuclei.tif')>0)
        yield row(f'pairs, brifiseg {v}: shift found (confidence {s.confidence:.2f}, standard error {s.error:.2f})', np.hypot(*s[:2]), 'px', '', 1)

def _put_in(f, bf, stains, d):
    "Error in px of `f`, which finds a shift, when one of `d` is put into a field: how much the shift found changes, less `d`"
    h,w = bf.shape
    def cut(o, d=(0,0)): return o[40-d[0]:h-40-d[0],40-d[1]:w-40-d[1]].astype(o.dtype)
    return float(np.hypot(*(np.array(f(cut(bf), [cut(s, d) for s in stains]))-np.array(f(cut(bf), [cut(s) for s in stains]))-d)))

def artefact_rows(rng, n, shape):
    "Bubbles found and clean area marked"
    found,clean = [],[]
    for c in DENSITIES.values():
        for _ in range(n):
            s = simulate_field(shape, rng.integers(2**31), confluence=c, bubbles=int(rng.integers(1, 6)))
            m = artefact_mask(s.brightfield)
            found.append(m[s.artefact==2].mean()); clean.append(m[s.artefact==0].mean())
    yield row('artefacts: share of bubbles found, worst field', min(found), '', '>= .95', 2*n)
    yield row('artefacts: share of clean area marked, worst field', max(clean), '', '<= .01', 2*n)

def seconds(f, turns=5): 
    took = []
    for _ in range(turns+1): start = time.perf_counter(); f(); took.append(time.perf_counter()-start)
    return median(took[1:])

_peak = '''from cellseg.fields import load_fields
{imports}
row = load_fields({csv!r}).iloc[0]
{call}
print(next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))/1e6)'''

def speed_rows(n, shape):
    "Seconds and memory of one field on one core, and how much faster two workers are"
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fields = simulate_fields(Path(d)/'in', n, shape, seed=1).drop(columns=['label','cells'])
        fields.to_csv(Path(d)/'fields.csv', index=False)
        f = fields.iloc[0]
        bf,nuc,cyt = (read_image(f[c]) for c in ('brightfield','nuclei','cytoplasm'))
        size = f'{shape[0]}x{shape[1]}'
        yield row(f'labelling a pair, {size}', seconds(lambda: fluorescence_labels(nuc, cyt)), 's', '<= 2', 1)
        yield row(f'the same by Otsu thresholds (peer), {size}', seconds(lambda: otsu(nuc, cyt)), 's', '', 1)
        yield row(f'checking a pair, reading included, {size}', seconds(lambda: field_numbers(f)), 's', '<= 1.5', 1)
        yield row(f'artefact mask, {size}', seconds(lambda: artefact_mask(bf)), 's', '', 1)
        for what,imports,call in (('labelling','from cellseg.labels import _label_field',f'_label_field(row, {d!r}, None, method="gmm")'),('checking','from cellseg.quality import field_numbers','field_numbers(row)')):
            out = subprocess.run([sys.executable,'-c',_peak.format(csv=str(Path(d)/'fields.csv'), imports=imports, call=call)], capture_output=True, text=True, check=True)
            yield row(f'peak memory of a worker {what}, {size}', float(out.stdout.split()[-1]), 'GB', '<= 1', 1)
        for what,f in dict(labelling=lambda k: label_fields(fields, Path(d)/f'label{k}', n_jobs=k), checking=lambda k: check_pairs(fields, n_jobs=k)).items():
            one,two = ((lambda t: (f(k), time.perf_counter()-t)[1])(time.perf_counter()) for k in (1,2))
            yield row(f'{what} {n} fields: two workers over one, starting them counted', one/two, 'x', '', n)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument('--quick', action='store_true'); p.add_argument('--out', type=Path); p.add_argument('--seed', type=int)
    args = p.parse_args()
    seed = args.seed if args.seed is not None else int(np.random.SeedSequence().entropy%2**31)
    rng,k,full = np.random.default_rng(seed),(1 if args.quick else 10),((400,500) if args.quick else (1440,1920))
    small = (400,500) if args.quick else (900,1200)
    rows = []
    parts = [truth_rows(rng, k, full),fall_rows(rng, 1 if args.quick else 3, small),ceiling_rows(rng, 1 if args.quick else 3, small),real_rows(),pair_rows(rng, 2 if args.quick else 20, small),real_pair_rows(),artefact_rows(rng, k, small),speed_rows(4 if args.quick else 16, full)]
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*(8-bit values|saturated).*')
        for part in parts:
            for r in part: rows.append(r); print('  '.join(o for o in r.values() if o), flush=True)
    command = 'python tests/benchmarks/labels.py'+' --quick'*args.quick+f' --seed {seed}'
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), '')
    folder = args.out or (None if args.quick else Path(__file__).parent/'results')
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).assign(machine=f'{cpu}, one thread', command=command).to_csv(folder/'labels.csv', index=False)
        lines = [list(rows[0]),['---']*len(rows[0]),*[r.values() for r in rows]]
        (folder/'labels.md').write_text(f'`{command}` on {cpu}, one thread\n\n'+'\n'.join('| '+' | '.join(map(str, l))+' |' for l in lines)+'\n', encoding='utf-8')
