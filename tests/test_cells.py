"Cells: nuclei parted, cells grown, compared one by one with the truth, and how far counts agree"
from types import SimpleNamespace
import numpy as np, pandas as pd
import pytest
from scipy import ndimage as ndi
from scipy.optimize import linear_sum_assignment
from skimage.measure import label as connected
from skimage.segmentation import watershed
from cellseg.cells import Cells,cell_instances,cells_from,nuclei_instances
from cellseg.compare import IOUS,agreement,compare_cells,match_cells
from cellseg.core import CellsegError,ImageError
from cellseg.io import read_image
from cellseg.simulate import simulate_field

def truth_of(sim): return np.where(sim.label==2, sim.cells, 0).astype(np.int32)

@pytest.mark.parametrize('confluence', (.3,.9))
def test_nuclei_of_a_simulated_field_are_found(rng, confluence):
    "Of all nuclei of at least 12 µm², at IoU .5; hardly any is merged or split"
    sim = simulate_field((720,960), seed=int(rng.integers(2**31)), confluence=confluence)
    true = truth_of(sim)
    small = np.bincount(true.ravel())<12/.345**2
    true[small[true]] = 0
    c = compare_cells(cell_instances(sim.label), true, 'nuclei')
    for wrong in (c.missed,c.merged+c.split,abs(c.error)): assert wrong<=2+.03*c.n_true, c

def pairs_of_nuclei(rng, n=40, share=.02):
    "Images of two touching nuclei each, with their truth"
    shapes = []
    while len(shapes)<12:
        true = truth_of(simulate_field((400,500), seed=int(rng.integers(2**31)), confluence=.3))
        shapes += [true[b]==i for i,b in enumerate(ndi.find_objects(true), 1) if b and b[0].start and b[1].start and b[0].stop<400 and b[1].stop<500 and (true[b]==i).sum()>400 and connected(true[b]==i).max()==1]
    for _ in range(n):
        a,b = (shapes[i] for i in rng.integers(len(shapes), size=2))
        img,angle = np.zeros((240,240), np.int32),rng.uniform(0, 2*np.pi)
        img[120-a.shape[0]//2:,120-a.shape[1]//2:][:a.shape[0],:a.shape[1]] = a
        for r in np.arange(100, 0, -1):
            y,x = (int(120+r*o-s//2) for o,s in zip((np.sin(angle),np.cos(angle)), b.shape))
            if min(y,x)<0 or y+b.shape[0]>240 or x+b.shape[1]>240: continue
            here = img[y:y+b.shape[0],x:x+b.shape[1]]
            if (b&(here==1)).sum()>=share*min(a.sum(), b.sum()): here[b&(here==0)] = 2; break
        yield img

def test_touching_nuclei_are_parted(rng):
    right = [compare_cells(nuclei_instances(img>0), img) for img in pairs_of_nuclei(rng)]
    assert np.mean([c.n_pred==2 for c in right])>.7 and not [c for c in right if c.n_pred>3]
    assert np.mean([c.matched for c in right])>1.5

def test_probabilities_part_what_the_label_does_not(rng):
    "Two discs with a wide neck; the network was in doubt in the middle"
    for _ in range(5):
        r,turn = rng.uniform(9, 13),rng.uniform(0, np.pi)
        y,x = np.mgrid[-30:31,-30:31]
        along = x*np.cos(turn)+y*np.sin(turn)
        mask = np.minimum(np.hypot(along-.55*r, x*np.sin(turn)-y*np.cos(turn)), np.hypot(along+.55*r, x*np.sin(turn)-y*np.cos(turn)))<r
        probs = np.where(np.abs(along)<3, .5, .98)
        assert nuclei_instances(mask).max()==1 and nuclei_instances(mask, probs=probs).max()==2
        p8 = (probs*255).round().astype(np.uint8)
        assert (nuclei_instances(mask, probs=p8)==nuclei_instances(mask, probs=probs)).mean()>.99

def test_cells_are_what_a_watershed_gives(rng):
    "The slow form: the whole mask flooded from the nuclei, over the distance to them"
    sim = simulate_field((600,700), seed=int(rng.integers(2**31)), confluence=float(rng.uniform(.3, .9)))
    nuclei = nuclei_instances(sim.label)
    cells = cells_from(nuclei, sim.label>0).cells
    flooded = watershed(ndi.distance_transform_edt(nuclei==0).astype(np.float32), nuclei, mask=sim.label>0)
    both = (flooded>0)&(cells<=nuclei.max())
    assert (cells==flooded)[both].mean()>.99, (cells==flooded)[both].mean()

def test_rules_of_cells(rng):
    "Random label images: numbers without a gap, nucleus k in cell k, 255 nobody's, cells of one piece with their nucleus"
    for _ in range(4):
        label = np.kron(rng.choice([0,1,2,255], (30,40), p=[.4,.3,.25,.05]), np.ones((6,6), int)).astype(np.uint8)
        label[::7,::5] = rng.integers(0, 3, label[::7,::5].shape)
        c = cell_instances(label, pixel_size=.6)
        for o in c: assert o.dtype==np.int32 and (np.bincount(o.ravel())[1:]>0).all()
        n = c.nuclei.max()
        assert n>0 and (c.cells==c.nuclei)[c.nuclei>0].all() and not c.cells[(label==255)|(label==0)].any()
        assert (np.bincount(c.nuclei.ravel())[1:]>=12/.36).all() and (np.bincount(c.cells.ravel())[n+1:]>=60/.36).all()
        pieces = connected(c.cells, connectivity=1, background=0)
        held = np.zeros(pieces.max()+1, bool); held[pieces[c.nuclei>0]] = True; held[0] = True
        assert (held[pieces]|(c.cells>n)).all()
        left = connected((c.cells==0)&np.isin(label, (1,2)), connectivity=1)
        assert not len(left[left>0]) or np.bincount(left.ravel())[1:].max()<60/.36 # crumbs only
        top = [b[0].start for b in ndi.find_objects(c.cells)]
        assert top[:n]==sorted(top[:n]) or [b[0].start for b in ndi.find_objects(c.nuclei)]==sorted(b[0].start for b in ndi.find_objects(c.nuclei))

def test_numbers_of_other_programs_are_taken(rng):
    sim = simulate_field((400,500), seed=int(rng.integers(2**31)), confluence=.5)
    nuclei = truth_of(sim)
    mix = rng.permutation(5000)[:nuclei.max()+1]+1; mix[0] = 0
    a,b = cells_from(nuclei, sim.label>0),cells_from(mix[nuclei].astype(np.uint16), sim.label>0)
    assert (a.nuclei==b.nuclei).all() and (a.cells==b.cells).all()
    assert a.nuclei.max()==len(np.unique(nuclei))-1
    bare = cells_from(nuclei, np.zeros(nuclei.shape, bool)) # no mask at all: cells are their nuclei
    assert (bare.cells==bare.nuclei).all() and bare.nuclei.max()==a.nuclei.max()

def test_bad_input():
    label = np.zeros((50,60), np.uint8)
    for bad,says in ((label[None],'(1, 50, 60)'),(label.astype(float),'float64'),(label+3,'holds 3, but there are 3 classes')):
        with pytest.raises(ImageError) as e: cell_instances(bad)
        assert says in str(e.value)
    with pytest.raises(ImageError, match='pixel_size is -1'): cell_instances(label, pixel_size=-1)
    with pytest.raises(CellsegError, match="must be called 'nucleus'"): cell_instances(label, classes=('background','cell'))
    with pytest.raises(ImageError, match='negative'): cells_from(label.astype(int)-1, label>0)
    with pytest.raises(ImageError, match='negative'): compare_cells(label.astype(int)-1, label)
    with pytest.raises(ImageError, match='differ in size'): compare_cells(label, label[1:])
    for f in (cell_instances,nuclei_instances,lambda o: cells_from(o, o>0)):
        with pytest.raises(ImageError, match=r'\(0, 5\)'): f(np.zeros((0,5), np.uint8))

# --- comparing

def slow_compare(pred, truth, iou):
    "All pairs one by one, matched by the best assignment"
    ps,ts = (np.setdiff1d(np.unique(o), 0) for o in (pred,truth))
    share = np.array([[((pred==p)&(truth==t)).sum()/((pred==p)|(truth==t)).sum() for p in ps] for t in ts]).reshape(len(ts), len(ps))
    r,c = linear_sum_assignment(-(share*(share>=iou)))
    good = share[r,c][share[r,c]>=iou]
    merged = sum(sum(2*((pred==p)&(truth==t)).sum()>(truth==t).sum() for t in ts)>1 for p in ps)
    split = sum(sum(2*((pred==p)&(truth==t)).sum()>(pred==p).sum() for p in ps)>1 for t in ts)
    m = len(good); total = len(ps)+len(ts)-m
    return m,len(ts)-m,len(ps)-m,merged,split,m/total if total else np.nan,good.sum()/(m+total-m-(len(ps)+len(ts)-2*m)/2) if total else np.nan

def drawn(rng, n=8, size=60):
    "Discs, and the same moved, cut, joined and lost"
    y,x = np.mgrid[:size,:size]
    truth,pred = np.zeros((2,size,size), np.int32)
    for k in range(1, n+1):
        r,c,s = *rng.uniform(5, size-5, 2),rng.uniform(4, 9)
        truth[np.hypot(y-r, x-c)<s] = k
        if rng.random()<.8: pred[np.hypot(y-r-rng.normal(0, 1.5), x-c-rng.normal(0, 1.5))<s*rng.uniform(.7, 1.2)] = rng.integers(1, n+1) if rng.random()<.2 else k+20
        if rng.random()<.2: pred[(pred==k+20)&(x>c)] = k+40
    return pred,truth

def test_comparison_is_that_of_a_slow_one(rng):
    for _ in range(12):
        pred,truth = drawn(rng)
        for iou in (.5,.7,.9):
            c,slow = compare_cells(pred, truth, iou=iou),slow_compare(pred, truth, iou)
            assert (c.matched,c.missed,c.invented,c.merged,c.split)==slow[:5], (c,slow)
            np.testing.assert_allclose([c.ap50,c.pq], slow[5:])
        np.testing.assert_allclose(c.ap, np.mean([slow_compare(pred, truth, o)[5] for o in IOUS]))
        assert c.error==c.n_pred-c.n_true==c.invented-c.missed

def test_names_of_cells_do_not_matter(rng):
    pred,truth = drawn(rng)
    mixed = [np.where(o>0, rng.permutation(1000)[o]+1, 0).astype(dtype) for o,dtype in ((pred,np.int64),(truth,np.uint16))]
    assert compare_cells(*mixed)==compare_cells(pred, truth)
    flipped = compare_cells(pred[::-1,::-1].T, truth[::-1,::-1].T)
    np.testing.assert_allclose(flipped, compare_cells(pred, truth))

def test_two_halves_are_one_match():
    "At exactly .5 there may be two partners: one is taken"
    truth = np.zeros((10,20), np.int32); truth[2:8,2:18] = 1
    pred = np.where(truth, 1+(np.arange(20)>=10), 0)
    c = compare_cells(pred, truth)
    assert (c.matched,c.invented,c.missed,c.split)==(1,1,0,1) and len(match_cells(pred, truth))==1
    c = compare_cells(truth, pred)
    assert (c.matched,c.invented,c.missed,c.merged)==(1,0,1,1)

def test_what_is_merged_split_lost_or_made_up_is_counted(rng):
    "Damage done to the true cells of a field, in known numbers"
    sim = simulate_field((700,800), seed=int(rng.integers(2**31)), confluence=.5)
    true = truth_of(sim)
    big = np.flatnonzero(np.bincount(true.ravel())>400)[1:]
    lost,cut,joined = np.split(rng.permutation(big)[:18], 3)
    pred = true.copy()
    pred[np.isin(pred, lost)] = 0
    for k in cut: r,c = np.nonzero(true==k); pred[r[c>np.median(c)],c[c>np.median(c)]] = 60000+k
    for a,b in zip(joined[::2], joined[1::2]): pred[pred==a] = b
    c = compare_cells(pred, true)
    assert (c.split,c.merged)==(6,3) and c.error==-6+6-3
    assert c.missed-c.invented==3
    sizes = np.bincount(true.ravel())
    even = sum(2*min(sizes[a], sizes[b])>=sizes[a]+sizes[b] for a,b in zip(joined[::2], joined[1::2]))
    assert 6+3<=c.missed<=6+6+6-even+3

def test_what_can_not_be_judged_costs_nothing(rng):
    "A bubble in the prediction; the truth knows nothing of it"
    sim = simulate_field((500,600), seed=int(rng.integers(2**31)), confluence=.5)
    label = sim.label.copy()
    r,c = rng.integers(100, 350, 2)
    label[r:r+120,c:c+120] = 255
    for what in Cells._fields:
        o = compare_cells(label, sim.label, what)
        assert (o.missed,o.invented,o.merged,o.split)==(0,0,0,0), (what,o)
    whole,under = (compare_cells(l, truth_of(sim), 'nuclei') for l in (sim.label,label))
    assert under.missed<=whole.missed and under.invented<=whole.invented and under.n_true<=whole.n_true
    label[:] = 255
    assert compare_cells(label, sim.label)[:6]==(0,0,0,0,0,0)

def test_a_cell_at_the_edge_of_what_is_hidden_counts_only_if_matched():
    one,none,hidden = np.zeros((30,40), np.int32),np.zeros((30,40), np.int32),np.zeros((30,40), bool)
    one[5:15,5:15],one[5:15,20:30],hidden[:,:8] = 1,2,True
    assert compare_cells(one, none, hidden=hidden)[3:6]==(0,0,1) and compare_cells(none, one, hidden=hidden)[3:6]==(0,1,0)
    assert compare_cells(one, one, hidden=hidden)[3:6]==(2,0,0)

def test_kinds_of_input_agree(rng):
    sim = simulate_field((300,400), seed=int(rng.integers(2**31)), confluence=.5)
    probs = np.stack([sim.label==k for k in range(3)]).astype(np.float32)
    cells = cell_instances(sim.label, probs)
    kinds = [SimpleNamespace(label=sim.label, probs=probs),cells,cells.cells,cells.cells.astype(np.int64)]
    got = [compare_cells(k, sim.cells) for k in kinds]
    assert all(g==got[0] for g in got)
    assert compare_cells(cells, cells)[3:]==(len(np.unique(cells.cells))-1,0,0,0,0,1,1,1,0,0)

def test_limits_of_agreement_hold_what_they_say(rng):
    "95 of 100 differences lie between the limits, and the intervals hold the true values in 95 of 100 experiments"
    inside,bias,low = [],[],[]
    for _ in range(400):
        b = rng.normal(100, 20, 25); a = b+rng.normal(-3, 5, 25)
        s = agreement(a, b)
        fresh = rng.normal(-3, 5, 50)
        inside.append(((fresh>s.low)&(fresh<s.high)).mean()); bias.append(s.bias_from<-3<s.bias_to); low.append(s.low_from<-3-1.96*5<s.low_to)
    assert .92<np.mean(inside)<.96 and .91<np.mean(bias)<.985 and .90<np.mean(low)<.99, (np.mean(inside),np.mean(bias),np.mean(low))

# --- real images

def test_real_nuclei_are_parted(data):
    "Another program's masks of nuclei in the nf1 images: as many as a person would count, within a few"
    for p in sorted((data/'nf1').glob('*_MaskNuclei.tiff')):
        mask = read_image(p)>0
        pieces,one = connected(mask).max(),nuclei_instances(mask, .645)
        assert pieces<=one.max()<=pieces*1.15+1, (p.name,pieces,one.max())
        assert ((one>0)==mask).all()

def test_real_two_classes(data):
    "Nuclear masks without cytoplasm (brifiseg): cells are their nuclei"
    for p in sorted((data/'brifiseg').glob('*_nuclei.tif')):
        label = (read_image(p)>0).astype(np.uint8)
        c = cell_instances(label, classes=('background','nucleus'), pixel_size=.5)
        assert (c.cells==c.nuclei).all() and 0<c.nuclei.max()<200
