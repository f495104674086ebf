"Tables of cells, sums of fields, wells of plates, and their figures"
from types import SimpleNamespace
import matplotlib.pyplot as plt
import numpy as np, pandas as pd
import pytest
from scipy.spatial import ConvexHull
from skimage.filters import threshold_otsu
from skimage.measure import regionprops_table
from cellseg.cells import Cells,cell_instances
from cellseg.compare import agreement
from cellseg.core import FieldsError,ImageError
from cellseg.counts import plot_agreement,plot_plate
from cellseg.io import read_image
from cellseg.measure import measure_cells,measure_field,outlier_wells,robust_z,well_place
from cellseg.simulate import simulate_field

@pytest.fixture
def sim(rng): return simulate_field((400,500), seed=int(rng.integers(2**31)), confluence=float(rng.uniform(.3, .8)))

def scattered(rng, n=25, shape=(150,200)):
    "Blobs of all kinds, also of one pixel and at the border, and their cores"
    cells = np.zeros(shape, np.int32)
    for k in range(1, n+1):
        r,c,h,w = rng.integers(0, shape[0]), rng.integers(0, shape[1]), *rng.integers(1, 25, 2)
        part = cells[r:r+h,c:c+w]
        part[(rng.random(part.shape)<rng.choice([.6,1])) & (part==0)] = k
    cells = np.searchsorted(np.unique(np.append(0, cells)), cells).astype(np.int32)
    return Cells(np.where(rng.random(shape)<.5, cells, 0).astype(np.int32), cells)

def test_numbers_are_those_of_scikit_image(rng):
    "Ragged blobs, one by one"
    for _ in range(5):
        cells = scattered(rng)
        img = rng.random(cells.cells.shape).astype(np.float32)
        t = measure_cells(cells, dict(x=img), pixel_size=.5)
        ref = pd.DataFrame(regionprops_table(cells.cells, img, properties=('area','centroid','eccentricity','perimeter','mean_intensity')))
        for a,b in zip(('area','row','col','eccentricity','perimeter','x_in_cell'), ref): np.testing.assert_allclose(t[a], ref[b], atol=2e-6, err_msg=a)
        np.testing.assert_allclose(t.area_um2, ref.area/4); np.testing.assert_allclose(t.perimeter_um, ref.perimeter/2)
        np.testing.assert_allclose(t.row_um, ref['centroid-0']/2)
        for part,where in (('nucleus',cells.nuclei>0),('cytoplasm',cells.nuclei==0)):
            means = [img[(cells.cells==k)&where].mean() if ((cells.cells==k)&where).any() else np.nan for k in t.cell]
            np.testing.assert_allclose(t[f'x_in_{part}'], means, rtol=1e-5)
        nuclei = np.array([(cells.nuclei==k).sum() for k in t.cell])
        assert (t.nucleus_area==nuclei).all() and (t.cytoplasm_area==t.area-nuclei).all() and (t.no_nucleus==(nuclei==0)).all()

def test_solidity_is_that_of_the_convex_hull(rng):
    "Against qhull, of the corners of the pixels"
    cells = scattered(rng)
    t = measure_cells(cells)
    for k in t.cell:
        r,c = np.nonzero(cells.cells==k)
        corners = np.concatenate([np.c_[r+a,c+b] for a in (-.5,.5) for b in (-.5,.5)])
        exact = len(r)/ConvexHull(corners).volume
        assert exact-1e-6<=t.solidity[k-1]<=exact*1.02+1e-6, (k,exact,t.solidity[k-1])

def test_turning_the_field_turns_the_table(sim):
    "Shape and size know nothing of direction"
    cells = cell_instances(sim.label)
    a = measure_cells(cells, dict(dna=sim.nuclei))
    b = measure_cells(Cells(*[np.ascontiguousarray(o.T[::-1]) for o in cells]), dict(dna=sim.nuclei.T[::-1]))
    for c in a.columns.drop(['row','col','row_um','col_um','solidity','nucleus_solidity']): np.testing.assert_allclose(b[c].astype(float), a[c].astype(float), atol=1e-6, err_msg=c)
    np.testing.assert_allclose(b.solidity, a.solidity, atol=.01)
    np.testing.assert_allclose(b.col, a.row); np.testing.assert_allclose(b.row, 499-a.col)

def test_confidence_and_probabilities(sim, rng):
    probs = rng.dirichlet([1,1,1], sim.label.shape).transpose(2,0,1).astype(np.float32)
    cells = cell_instances(sim.label)
    p = SimpleNamespace(label=sim.label, probs=probs)
    t = measure_cells(p, cells=cells)
    k = int(rng.integers(1, len(t)+1))
    np.testing.assert_allclose(t.confidence[k-1], probs.max(0)[cells.cells==k].mean(), rtol=1e-5)
    t8 = measure_cells(SimpleNamespace(label=sim.label, probs=(probs*255).round().astype(np.uint8)), cells=cells)
    np.testing.assert_allclose(t8.confidence, t.confidence, atol=.003)
    assert measure_cells(sim.label).confidence.isna().all()

def test_flags(rng):
    "A field with a bubble and a border: every flag, pixel by pixel"
    sim = simulate_field((300,400), seed=int(rng.integers(2**31)), confluence=.6)
    label = sim.label.copy()
    label[100:180,150:260] = 255
    cells = cell_instances(label)
    t = measure_cells(label, cells=cells)
    pad = np.pad(label, 1, constant_values=0)
    near = np.logical_or.reduce([pad[1+i:301+i,1+j:401+j]==255 for i,j in ((0,1),(1,0),(0,-1),(-1,0))])
    for k in t.cell:
        r,c = np.nonzero(cells.cells==k)
        assert t.cannot_be_judged[k-1]==near[r,c].any()
        assert t.touches_border[k-1]==bool(r.min()==0 or c.min()==0 or r.max()==299 or c.max()==399)
        r,c = np.nonzero(cells.nuclei==k)
        assert t.nucleus_cut[k-1]==(len(r)>0 and bool(r.min()==0 or c.min()==0 or r.max()==299 or c.max()==399))
        assert t.no_nucleus[k-1]==(len(r)==0)
    assert t.cannot_be_judged.any() and t.touches_border.any()

def test_a_nucleus_without_cell_and_a_cell_without_nucleus():
    label = np.zeros((80,120), np.uint8)
    label[20:40,20:40] = 2; label[20:50,70:110] = 1
    t = measure_cells(label)
    assert t.no_cytoplasm.tolist()==[True,False] and t.no_nucleus.tolist()==[False,True]
    assert t.ratio.tolist()==[1,0] and np.isnan(t.nucleus_eccentricity[1]) and t.nucleus_area.tolist()==[400,0]
    f = measure_field(t, label)
    assert (f['count'],f['without_nucleus'])==(1,1)
    two = measure_cells((label==2).astype(np.uint8), classes=('background','nucleus'))
    assert two.cytoplasm_area.isna().all() and two.ratio.isna().all() and not two.no_cytoplasm.any() and two.area.tolist()==[400]

def test_empty_tables_have_the_same_columns(sim):
    full = measure_cells(sim.label, dict(dna=sim.nuclei))
    for label in (np.zeros_like(sim.label),np.full_like(sim.label, 255)):
        none = measure_cells(label, dict(dna=sim.nuclei))
        assert len(none)==0 and none.dtypes.equals(full.dtypes)
        assert pd.concat([none,full]).dtypes.equals(full.dtypes)
        f = measure_field(none, label)
        assert f['count']==0 and list(f)==list(measure_field(full, sim.label)) and f['unjudged']==(label==255).mean()

def test_pixel_size_changes_units_alone(sim):
    cells = cell_instances(sim.label)
    a,b = (measure_cells(sim.label, cells=cells, pixel_size=p) for p in (None,.69))
    np.testing.assert_allclose(b.area_um2, 4*a.area_um2); np.testing.assert_allclose(b.perimeter_um, 2*a.perimeter_um)
    assert (a.area==b.area).all() and (a.eccentricity==b.eccentricity).all()
    fa,fb = measure_field(a, sim.label),measure_field(b, sim.label, .69)
    assert fa['count']==fb['count'] and fa['density']==pytest.approx(4*fb['density'])

def test_density_does_not_depend_on_how_a_field_is_cut(rng):
    "Nuclei at the cuts count half in each part; counted whole they are too many"
    sim = simulate_field((1000,1200), seed=int(rng.integers(2**31)), confluence=.9)
    def field(label): return measure_field(measure_cells(label), label)
    whole,parts = field(sim.label),[field(sim.label[r:r+250,c:c+300]) for r in range(0, 1000, 250) for c in range(0, 1200, 300)]
    assert abs(np.mean([p['density'] for p in parts])/whole['density']-1)<.06 # specks cut off are lost
    assert sum(p['count'] for p in parts)>1.07*whole['count'] and sum(p['count_inside'] for p in parts)<.9*whole['count']
    assert np.mean([p['confluence'] for p in parts])==pytest.approx(whole['confluence'])

def test_field_is_that_of_its_truth(sim):
    t = measure_cells(sim.label); f = measure_field(t, sim.label)
    assert f['confluence']==pytest.approx((sim.label>0).mean()) and f['unjudged']==0
    inner = t[~(t.touches_border|t.no_nucleus)]
    assert f['median_area_um2']==pytest.approx(inner.area_um2.median()) and f['count']==len(t)-f['without_nucleus']
    half = sim.label.copy(); half[:200] = 255
    g = measure_field(measure_cells(half), half)
    assert g['unjudged']==.5 and g['confluence']==pytest.approx((sim.label[200:]>0).mean())

def test_bad_input(sim):
    with pytest.raises(ImageError, match="channel 'dna' has shape"): measure_cells(sim.label, dict(dna=sim.nuclei[1:]))
    with pytest.raises(ImageError, match='cells_from'): measure_cells(sim.cells)
    with pytest.raises(ImageError, match='differ in size'): measure_cells(sim.label[1:], cells=cell_instances(sim.label))
    with pytest.raises(ImageError, match='pixel_size is 200'): measure_cells(sim.label, pixel_size=200)

# --- wells

def test_every_well_of_every_plate_is_read():
    rows = [chr(65+i) for i in range(26)]+['A'+chr(65+i) for i in range(6)]
    for i,r in enumerate(rows):
        for c in (1,9,10,48):
            for name in (f'{r}{c}',f'{r}{c:02}',f'{r.lower()}{c:02}',f' {r}-{c:02} ',f'{r}{c:03}'): assert well_place(name)==(i,c-1), name
    for bad in ('','A','12','A0','B100','AG1','well A1','A1.5',None,np.nan):
        with pytest.raises(FieldsError, match='is no well'): well_place(bad)

def test_odd_wells_are_found_and_others_are_not(rng):
    "Three wells of 96, far from the others; without them in 20 plates hardly any"
    names = [f'{r}{c:02}' for r in 'ABCDEFGH' for c in range(1, 13)]
    false = 0
    for _ in range(20):
        plate = pd.DataFrame(dict(well=names, count=rng.normal(200, 15, 96)))
        false += outlier_wells(plate, 'count').outlier.sum()
        odd = rng.choice(names, 3, replace=False)
        plate.loc[plate.well.isin(odd),'count'] += 150*rng.choice([-1,1])
        found = outlier_wells(plate.sample(frac=1, random_state=0), 'count')
        assert set(odd)<=set(found.well[found.outlier]) and found.well.tolist()==names
    assert false<=12, false # 1920 wells, about 1 in 2000 expected, a few more as the MAD itself is estimated

def test_robust_z(rng):
    x = rng.normal(5, 2, 2001)
    np.testing.assert_allclose(robust_z(x), (x-np.median(x))*.6745/np.median(np.abs(x-np.median(x))))
    assert abs(robust_z(x).std()-1)<.1
    np.testing.assert_allclose(robust_z(10-3*x), -robust_z(x))
    z = robust_z([3,3,3,3,3,3,9])
    assert z[0]==0 and z[-1]>3.5 and (robust_z([2,2,2])==0).all() and np.isnan(robust_z([1,2,np.nan])[2])

# --- figures

@pytest.fixture
def closed():
    yield
    plt.close('all')

def test_plate_shows_each_well_in_its_place(rng, closed):
    names = [f'{r}{c}' for r in 'CDE' for c in (2,5,11)]
    table = pd.DataFrame(dict(well=names*2, count=rng.uniform(10, 20, 18)))
    ax = plot_plate(table, 'count')
    img = np.ma.filled(ax.images[0].get_array().astype(float), np.nan)
    assert img.shape==(8,12) and np.isnan(img).sum()==96-9
    for w,v in table.groupby('well')['count'].mean().items(): assert img[well_place(w)]==pytest.approx(v)
    assert [t.get_text() for t in ax.get_yticklabels()]==list('ABCDEFGH')
    assert len([t for t in ax.texts if t.get_text()])==9
    assert plot_plate(pd.DataFrame(dict(well=['AA30'], count=[1.])), 'count').images[0].get_array().shape==(32,48)
    assert plot_plate(table, 'count', wells=384).images[0].get_array().shape==(16,24)

def test_agreement_is_drawn_where_it_is(rng, closed):
    a,b = rng.uniform(50, 90, (2,30))
    s,ax = agreement(a, b),plot_agreement(a, b, ('x','y'), 'things')
    heights = sorted(l.get_ydata()[0] for l in ax.lines[1:4])
    np.testing.assert_allclose(heights, [s.low,s.bias,s.high])
    low,high = ax.get_ylim()
    assert low<min((a-b).min(), s.low) and high>max((a-b).max(), s.high) and 'things' in ax.get_xlabel() and 'x − y' in ax.get_ylabel()

# --- real images

def test_real_plate_is_counted(data):
    "Nuclei of the plate's second channel: every field has some, of the size of nuclei"
    for p in sorted((data/'sbs_plate').glob('*hannel2*'))[:3]:
        img = read_image(p)
        label = (img>threshold_otsu(img)).astype(np.uint8)
        t = measure_cells(label, dict(dna=img), pixel_size=.645, classes=('background','nucleus'))
        f = measure_field(t, label, .645, ('background','nucleus'))
        assert 20<f['count']<1000 and 20<t.area_um2[~t.touches_border].median()<400, (p.name,f)
        assert (t.dna_in_nucleus>threshold_otsu(img)).all()
