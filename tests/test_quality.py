"Is a pair fit to train on? Shifts against shifts put in, verdicts against what was spoilt, repairs against windows known beforehand; on simulated and on real images"
import functools,os,subprocess,sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, tifffile
from scipy import ndimage as ndi
import cellseg.quality as quality
from cellseg.core import FieldsError,ImageError
from cellseg.io import image_info,read_image,write_image
from cellseg.quality import LIMITS,channel_numbers,check_pairs,field_numbers,find_shift,judge_fields,repair_pairs
from cellseg.simulate import simulate_field,simulate_fields

def believed(shift, limits=LIMITS):
    "Would this shift be repaired?"
    return quality._sure(dict(shift_confidence=shift.confidence, shift_error=shift.error), limits)

def window(img, row=0, col=0, m=32):
    "A window whose content lies `row` px lower and `col` px further right than in the window (0,0)"
    return img[m-row:img.shape[0]-m-row, m-col:img.shape[1]-m-col]

def some_field(rng, shape, confluence, **kwargs):
    return simulate_field(shape, seed=int(rng.integers(2**31)), confluence=confluence, noise=rng.uniform(.5,3), z=rng.uniform(2,5)*rng.choice([-1,1]), **kwargs)

def parallel(f, items):
    from joblib import Parallel,delayed
    return Parallel(2, 'threading')(delayed(f)(*i) for i in items)

def spoil(fields, i, column, f):
    "Change an image of a field in place"
    img = f(read_image(fields[column][i]))
    if img.ndim==3: tifffile.imwrite(fields[column][i], img, photometric='rgb')
    else: write_image(fields[column][i], img, pixel_size=image_info(fields[column][i]).pixel_size)

def snapshot(folder): return {p:p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

# ---- shifts

@pytest.mark.parametrize('confluence', [15/16,.3])
def test_shifts_are_found_and_strangers_are_not_believed(rng, confluence):
    "Other noise and other focus each time; windows of a larger field, so that no border tells the answer"
    fields = [some_field(rng, (664,764), confluence) for _ in range(13)]
    shifts = rng.integers(-30, 31, (len(fields),2))
    def one(i):
        bf,*stains = (window(o) for o in fields[i][:3])
        found = find_shift(bf, [window(o, *shifts[i]) for o in fields[i][1:3]])
        strange = find_shift(bf, [window(o, *shifts[i]) for o in fields[i-1][1:3]])
        return np.hypot(*(shifts[i]-found[:2])), believed(found), strange.confidence, believed(strange)
    off,sure,strange,wrong = map(np.array, zip(*parallel(one, [(i,) for i in range(len(fields))])))
    print(off, strange)
    assert (off<1).mean()>=.95 or (off>=1).sum()<=1, off
    assert not (sure&(off>=1)).any() and sure.mean()>.7
    assert not wrong.any() and strange.max()<.65 and np.median(strange)<.35

def test_sign_and_fractions_of_a_pixel(rng):
    "scipy moves the stain by an amount with a fraction; what is found moves by the same"
    sim = some_field(rng, (500,560), .6)
    a = find_shift(sim.brightfield, [sim.nuclei,sim.cytoplasm])
    for move in ((0,7.4),(-12.3,0),(5.5,-9.25)):
        b = find_shift(sim.brightfield, [ndi.shift(o.astype(np.float32), move, order=3, mode='reflect') for o in (sim.nuclei,sim.cytoplasm)])
        assert np.abs(np.subtract(b[:2], a[:2])-move).max()<.35, (move, a, b)
        assert abs(b.rotation)<max(5*b.rotation_error, .1)

@pytest.mark.parametrize('degrees,percent', [(.6,0),(-1.2,0),(0,1),(.8,-.7)])
def test_rotation_and_enlargement(rng, degrees, percent):
    sim = some_field(rng, (600,700), 15/16)
    a = np.radians(degrees)
    back = np.linalg.inv(np.array([[np.cos(a),np.sin(a)],[-np.sin(a),np.cos(a)]])*(1+percent/100)) # clockwise, in rows and columns
    c = np.array([299.5,349.5])
    got = find_shift(sim.brightfield, [ndi.affine_transform(o.astype(np.float32), back, c-back@c, order=1, mode='reflect') for o in (sim.nuclei,sim.cytoplasm)])
    assert abs(got.rotation-degrees)<.2 and abs(got.scale-percent)<.35, got
    assert abs(degrees)<.1 or abs(got.rotation)>5*got.rotation_error
    assert abs(percent)<.1 or abs(got.scale)>5*got.scale_error

def test_units_offset_and_orientation_do_not_matter(rng):
    sim = some_field(rng, (464,564), .5)
    bf,n = window(sim.brightfield).astype(np.float64),window(sim.nuclei, 9, -14).astype(np.float64)
    a = find_shift(bf, n)
    for b,s in ((bf/60000-.4, n*3+500),(bf*.01, n/1000)): assert np.allclose(find_shift(b, s)[:3], a[:3], atol=.1)
    assert np.allclose(find_shift(bf.T, n.T)[:2], a[1::-1], atol=.3)
    assert np.allclose(find_shift(bf[::-1], n[::-1])[:2], [-a.row,a.col], atol=.3)
    assert np.allclose(find_shift(n, n)[:2], 0, atol=.05)

def test_shift_refuses(rng):
    img = rng.integers(0, 1000, (100,120)).astype(np.uint16)
    for args,words in (((img,img[1:]),r'\(100, 120\), but a stain is \(99, 120\)'), ((img,[]),'at least one stain'), ((img[:50],img[:50]),'at least 64 pixels'), ((img*0,img),'same value everywhere'),
        ((img,img,0),'max_shift is 0'), ((img.astype(complex),img),'must hold numbers'), ((np.where(img>900, np.inf, img),img),'NaN or infinity'), ((img,np.stack([img]*3)),r'\(3, 100, 120\)')):
        with pytest.raises(ImageError, match=words): find_shift(*args)

# ---- real images

def real_pairs(data):
    "Name, bright-field, stains of the registered real fields"
    folder = data/'cellpainting_bf'
    bf,cell,dna = (read_image(folder/f'r03c03f03p01-ch{i}sk1fk1fl1.tiff') for i in (1,3,5))
    yield 'cell painting',bf,[dna,cell]
    for p in sorted((data/'brifiseg').glob('*_BF.tif')): yield p.stem,read_image(p),[read_image(p.with_name(p.name.replace('_BF','_nuclei')))>0]
    def neuron(part): return read_image(next(p for p in (data/'isl_neuron').iterdir() if part in p.name))
    for z in (2,10): yield f'neurons, plane {z}',neuron(f'z_depth-{z},'),[neuron('DAPI'),neuron('MAP2')]

def test_real_pairs(data):
    """Registered as they are: at most 2 px apart, or not believed. A shift put in comes out as that much more.
    (Where confidence is low the place found must still follow the shift put in, within 2 px.)"""
    seen = {}
    def one(name, bf, stains):
        a,moves = find_shift(bf, stains),((17,-23),(-30,9),(4,31))
        return name, a, moves, [find_shift(window(bf), [window(s, *m) for s in stains]) for m in moves]
    for name,a,moves,got in parallel(one, list(real_pairs(data))):
        seen[name] = a
        assert np.hypot(*a[:2])<=2 or not believed(a), (name, a)
        for m,b in zip(moves, got): assert np.hypot(*(np.subtract(b[:2], a[:2])-m))<=2, (name, m, a, b)
    assert believed(seen['cell painting']) and len(seen)==8
    assert not any(believed(s) for n,s in seen.items() if 'neurons' in n) # its planes lie up to 5 px apart: slanting light

def test_real_strangers_are_not_believed(data):
    pairs = [(b,s) for n,b,s in real_pairs(data) if 'A549' in n]
    got = [find_shift(pairs[i][0], pairs[j][1]) for i in range(5) for j in range(5) if i!=j]
    assert not any(believed(g) for g in got), [g for g in got if believed(g)]

def test_real_fields_are_not_excluded(data):
    c = data/'cellpainting_bf'
    rows = [dict(field='cp', brightfield=str(c/'r03c03f03p01-ch1sk1fk1fl1.tiff'), cytoplasm=str(c/'r03c03f03p01-ch3sk1fk1fl1.tiff'), nuclei=str(c/'r03c03f03p01-ch5sk1fk1fl1.tiff'), label=None)]
    rows += [dict(field=p.stem, brightfield=str(p), cytoplasm=None, nuclei=None, label=str(p.with_name(p.name.replace('_BF','_nuclei')))) for p in sorted((data/'brifiseg').glob('*_BF.tif'))]
    checks = check_pairs(pd.DataFrame(rows), n_jobs=1)
    assert checks.verdict[0]=='fit' and 'exclude' not in set(checks.verdict), checks[['verdict','why']].values

def test_real_eight_bits_are_named(data):
    n = channel_numbers(read_image(sorted((data/'nf1').glob('*_DAPI_001.tif'))[0]), stain=True)
    assert n['step']==257
    assert channel_numbers(read_image(data/'cellpainting_bf'/'r03c03f03p01-ch5sk1fk1fl1.tiff'), stain=True)['step']==1

# ---- one channel

@pytest.mark.parametrize('confluence', [.97,.3,.05])
def test_empty_and_full_stains(rng, confluence):
    "A stain that failed is noise on an uneven background; a dim one is still a stain"
    sim = some_field(rng, (500,600), confluence)
    look,exclude = LIMITS['structure'][:2]
    for img in sim[:3]: assert channel_numbers(img)['structure']>(look if confluence>.1 else exclude) # almost empty fields come near the first limit
    for img in sim[1:3]: assert channel_numbers(rng.poisson(300+(img.astype(float)-300).clip(0)*.1))['structure']>exclude # a tenth of the light
    for level in (5,300,5000):
        failed = rng.poisson(level*np.linspace(.6, 1.2, 600)*np.ones((500,1)))
        assert channel_numbers(failed.astype(np.uint16), stain=True)['structure']<1.5
        assert channel_numbers((failed+rng.normal(0, 6, failed.shape)).astype(np.float32), stain=True)['structure']<1.5

def test_saturation_is_counted_and_only_there(rng):
    sim = some_field(rng, (400,400), .6)
    for top in (4095,3000):
        img = np.minimum(sim.nuclei, top)
        assert channel_numbers(img)['saturated']==(img==top).mean()>0
    eight = (sim.brightfield/sim.brightfield.max()*255).astype(np.uint8)
    flat = rng.integers(0, 200, (400,400)).astype(np.uint8) # the highest value is common, but no more than others
    for img in (sim.brightfield, sim.nuclei, eight, flat, sim.nuclei.astype(np.float32)): assert channel_numbers(img)['saturated']==0

def test_focus_falls_with_blur(rng):
    sim = some_field(rng, (500,500), 15/16)
    for img in sim[:3]:
        focus = [channel_numbers((ndi.gaussian_filter(img.astype(float), s)+rng.normal(0, 20, img.shape)).astype(np.float32))['focus'] for s in (0,1,2,3)]
        assert all(a>1.15*b for a,b in zip(focus, focus[1:])), focus

def test_area_and_unevenness(rng):
    for confluence in (15/16,.3):
        sim = some_field(rng, (500,600), confluence)
        assert abs(channel_numbers(sim.cytoplasm, stain=True)['area']-(sim.label>0).mean())<.05
        assert abs(channel_numbers(sim.nuclei, stain=True)['area']-(sim.label==2).mean())<.06
    y = np.linspace(-1, 1, 500)[:,None]
    light = 10000*(1-.4*y**2)*np.ones(500)
    assert abs(channel_numbers(rng.poisson(light))['uneven']-.4*.875**2/(1-.4/3))<.03 # between the centres of the outer parts, as a share of the mean
    assert channel_numbers(rng.poisson(np.full((500,500), 10000)))['uneven']<.02

# ---- tables

@pytest.fixture
def fields(tmp_path, rng):
    return simulate_fields(tmp_path/'in', 10, (320,360), seed=int(rng.integers(2**31)), confluence=.6)

def test_good_fields_are_fit(fields):
    "Of ten fields of one kind none is excluded, none called odd by more than chance, and the label image beside the stains does no harm"
    checks = check_pairs(fields, n_jobs=2)
    assert 'exclude' not in set(checks.verdict) and (checks.verdict=='fit').sum()>=8, checks[['verdict','why']].values
    assert checks.field.tolist()==fields.field.tolist() and np.hypot(checks.shift_row, checks.shift_col).max()<1.5
    assert not any(c.startswith('thumb') for c in checks)

def test_everything_that_can_be_wrong_is_named(fields, rng):
    before = check_pairs(fields.drop(columns=['label','cells']), n_jobs=2)
    for c in ('nuclei','cytoplasm'): spoil(fields, 0, c, lambda o: np.roll(o, (-11,8), (0,1)))
    spoil(fields, 1, 'cytoplasm', lambda o: rng.poisson(300, o.shape).astype(np.uint16))
    spoil(fields, 2, 'nuclei', lambda o: np.minimum(o, np.percentile(o, 77).astype(np.uint16)))
    n,c = (read_image(fields[k][3]) for k in ('nuclei','cytoplasm'))
    spoil(fields, 3, 'nuclei', lambda o: c); spoil(fields, 3, 'cytoplasm', lambda o: n)
    spoil(fields, 4, 'nuclei', lambda o: np.stack([o]*3, -1))
    Path(fields.brightfield[5]).unlink()
    spoil(fields, 6, 'cytoplasm', lambda o: np.where(np.arange(o.size).reshape(o.shape)==77, np.nan, o).astype(np.float32))
    spoil(fields, 7, 'nuclei', lambda o: o.astype(np.float32)-np.float32(np.median(o)))
    spoil(fields, 8, 'brightfield', lambda o: o[:-3])
    for k in ('brightfield','nuclei','cytoplasm'): spoil(fields, 9, k, lambda o, k=k: (read_image(fields[k][7])*1.3).clip(-2000,60000).astype(np.float32))
    checks = check_pairs(fields.drop(columns=['label','cells']), n_jobs=2)
    expected = {0:('exclude','px right of and 1'), 1:('exclude','the whole-cell stain is empty: no cell stands out of the noise'), 2:('exclude','% of the nuclear stain is saturated'), 3:('exclude','are they swapped'),
        4:('exclude','is a colour image'), 5:('exclude','no such file'), 6:('exclude','NaN or infinite'), 7:('look','the nuclear stain holds negative values'), 8:('exclude','export them at one size'),
        9:('look','almost the same as of field sim0007, which comes first')}
    for i,(verdict,why) in expected.items():
        assert checks.verdict[i]==verdict and why in checks.why[i], (i, checks.verdict[i], checks.why[i])
        assert why not in before.why[i], before.why[i] # the words come from what was done to it
    assert np.abs(checks.loc[0, ['shift_row','shift_col']].astype(float)-[-11,8]).max()<1

def test_odd_one_out_within_its_plate(tmp_path, rng):
    "Two plates of unlike brightness: a dim field stands out of the bright plate alone"
    fields = simulate_fields(tmp_path, 17, (200,200), seed=int(rng.integers(2**31)), confluence=.8).drop(columns=['label','cells','nuclei'])
    fields['plate'] = ['a']*9+['b']*8
    for i in range(9, 17): spoil(fields, i, 'brightfield', lambda o: o//4)
    spoil(fields, 4, 'brightfield', lambda o: o//4)
    checks = check_pairs(fields, n_jobs=2)
    odd = checks.why.str.contains('brightness of the bright-field')
    assert odd.tolist()==[i==4 for i in range(17)], checks.why.tolist()
    assert not check_pairs(fields[:7], n_jobs=2).why.str.contains('unlike').any() # too few to compare

def test_files_mixed_up_and_stains_of_another_field(fields):
    write_image(fields.brightfield[3], read_image(fields.brightfield[2]))
    checks = check_pairs(fields[:4].drop(columns=['label','cells']), n_jobs=1)
    assert 'were files mixed up?' in checks.why[3] and 'of field sim0002' in checks.why[3] and 'were files mixed up?' in checks.why[2]
    assert 'are they of the same field?' in checks.why[3] and checks.shift_confidence[3]<.65 and checks.verdict[3]=='look'

def test_a_field_that_is_there_twice(fields):
    "The first may stay, the second should be looked at; also after a change of brightness and noise"
    table,rng = fields[['field','brightfield','nuclei']][:3].copy(),np.random.default_rng(0)
    for c in ('brightfield','nuclei'):
        img = read_image(table[c][0])
        write_image(table[c][2], (img*.7+rng.normal(100, 10, img.shape)).clip(0,65535).astype(np.uint16))
    checks = check_pairs(table, n_jobs=1)
    assert checks.verdict.tolist()==['fit','fit','look'] and 'almost the same as of field sim0002' in checks.why[0] and not checks.why[1] and 'sim0000, which comes first' in checks.why[2]

def test_less_than_three_channels(fields, rng):
    alone = check_pairs(fields[['field','brightfield','nuclei']][:3], n_jobs=1)
    assert set(alone.verdict)=={'fit'} and not any('cytoplasm' in c for c in alone), alone.why.tolist()
    labels = fields[['field','brightfield','label']][:6].copy()
    write_image(labels.label[1], np.zeros((320,360), np.uint8))
    write_image(labels.label[2], ((read_image(labels.label[2])>0)*255).astype(np.uint8))
    large = simulate_field((564,564), seed=int(rng.integers(2**31)), confluence=.8)
    for c,img in dict(brightfield=window(large.brightfield), label=window(large.label, 0, 15)).items(): write_image(labels[c][3], img)
    labels.loc[4,'label'] = labels.loc[5,'brightfield'] = None
    got = check_pairs(labels, n_jobs=1)
    for i,(verdict,why) in {0:('fit',''), 1:('exclude','the label image holds no cell'), 2:('exclude','255 means "ignore"'), 3:('exclude','px right of'), 4:('exclude','neither a stain nor a label'), 5:('exclude','no bright-field')}.items():
        assert got.verdict[i]==verdict and why in got.why[i], (i, got.why[i])
    lost = fields[['field','brightfield','nuclei','cytoplasm']][:2].copy()
    lost.loc[0,'nuclei'] = None
    got = check_pairs(lost, n_jobs=1)
    assert got.verdict[0]=='look' and 'the nuclear stain of this field is missing' in got.why[0] and got.verdict[1]=='fit'

def test_other_column_names_and_an_index_of_its_own(fields):
    table = fields.rename(columns=dict(brightfield='bf', nuclei='hoechst', cytoplasm='tubulin')).drop(columns=['label','cells'])[:2].set_index(pd.Index([40,7]))
    got = check_pairs(table, n_jobs=1, brightfield='bf', stains=('hoechst','tubulin'))
    assert got.index.tolist()==[40,7] and got.verdict.tolist()==['fit','fit'] and 'area_hoechst' in got
    with pytest.raises(FieldsError, match='none of the columns brightfield'): check_pairs(table)
    with pytest.raises(FieldsError, match="no limit is called 'blur'"): check_pairs(fields, limits=dict(blur=(1,2)))

def test_all_broken(fields, tmp_path):
    for p in fields.brightfield: Path(p).write_bytes(b'')
    checks = check_pairs(fields[:3], n_jobs=1)
    assert set(checks.verdict)=={'exclude'} and checks.why.str.contains('0 bytes').all()
    assert repair_pairs(fields[:3], checks, tmp_path/'out').repaired.str.startswith('not repaired').all() and not (tmp_path/'out').exists()

def test_verdicts_come_from_numbers_alone():
    good = dict(problem=None, note=None, height=1000., width=1000., shift_row=.2, shift_col=.1, shift_confidence=.95, shift_error=.1, rotation=.0, rotation_error=.01, scale=.0, scale_error=.01, structure_brightfield=20.,
        structure_nuclei=100., structure_cytoplasm=100., saturated_brightfield=0., saturated_nuclei=0., saturated_cytoplasm=0., uneven_brightfield=.1, area_nuclei=.2, area_cytoplasm=.6, step_nuclei=1, artefact_share=0.)
    cases = [({},'fit',''), (dict(shift_col=-2.),'look','2.0 px left of bright-field'), (dict(shift_row=7.),'exclude','7.0 px below'), (dict(shift_row=7., shift_confidence=.7),'look','perhaps'), (dict(shift_row=7., shift_confidence=.3),'look','of the same field?'),
        (dict(shift_row=7., shift_confidence=.85, shift_error=2.),'look','its parts disagree'), (dict(rotation=.5),'exclude','rotated by 0.50°'), (dict(rotation=.5, rotation_error=.2),'fit',''), (dict(scale=-.4),'look','-0.40 % larger'),
        (dict(structure_nuclei=1.1),'exclude','nuclear stain is empty'), (dict(structure_cytoplasm=4.),'look','whole-cell stain is weak'), (dict(saturated_cytoplasm=.23),'exclude','23 % of the whole-cell stain'), (dict(saturated_nuclei=.01),'look','1 % of the nuclear'),
        (dict(uneven_brightfield=.8),'look','unevenly'), (dict(area_nuclei=.8),'look','swapped'), (dict(area_nuclei=.8, area_cytoplasm=.3),'exclude','swapped'), (dict(step_nuclei=257),'fit','8 bits'), (dict(artefact_share=.2),'look','20 % of the bright-field'), (dict(artefact_share=.7),'exclude','70 %'),
        (dict(problem='x.tif: no such file'),'exclude','x.tif: no such file'), (dict(note='odd'),'look','odd'), (dict(shift_row=np.nan, shift_col=np.nan, shift_confidence=np.nan),'fit','')]
    numbers = pd.DataFrame([good|dict(field=str(i))|c for i,(c,_,_) in enumerate(cases)])
    got = judge_fields(numbers)
    for (c,verdict,why),(_,o) in zip(cases, got.iterrows()): assert o.verdict==verdict and why in o.why and (why or not o.why), (c, o.tolist())
    assert judge_fields(numbers, limits=LIMITS|dict(shift=(8,20))).verdict[2]=='fit'

# ---- stopped, and gone on

def test_stopped_check_goes_on(fields, tmp_path, monkeypatch):
    calls,real = [],quality.field_numbers
    @functools.wraps(real)
    def counted(row, **kwargs):
        if len(calls)==stop: raise KeyboardInterrupt
        calls.append(row['field'])
        return real(row, **kwargs)
    monkeypatch.setattr(quality, 'field_numbers', counted)
    table,stop = fields.drop(columns=['label','cells'])[:6],4
    with pytest.raises(KeyboardInterrupt): check_pairs(table, n_jobs=1, keep=tmp_path/'keep')
    assert len(calls)==4
    stop = None
    checks = check_pairs(table, n_jobs=1, keep=tmp_path/'keep')
    assert sorted(calls)==table.field.tolist() # each once
    monkeypatch.undo()
    pd.testing.assert_frame_equal(checks, check_pairs(table, n_jobs=2), check_dtype=False)
    spoil(table, 2, 'nuclei', lambda o: np.roll(o, 9, 0)[:, :-1]) # a changed file is looked at again
    assert 'export them at one size' in check_pairs(table, n_jobs=1, keep=tmp_path/'keep').why[2]

# ---- repair

def test_repair(fields, tmp_path, rng):
    "Bright-field is cut where the shift put in says, stains, label and cells where it says otherwise; files and fields not concerned stay as they are"
    big = simulate_field((464,464), seed=int(rng.integers(2**31)), confluence=.6)
    move = [int(m) for m in rng.choice([-1,1], 2)*rng.integers(4, 25, 2)]
    for c in ('brightfield','nuclei','cytoplasm','label','cells'):
        write_image(fields[c][0], np.ascontiguousarray(window(getattr(big, c), *((0,0) if c=='brightfield' else move))), pixel_size=.345)
    for c in ('nuclei','cytoplasm'): write_image(fields[c][1], read_image(fields[c][2])) # of another field: must not be repaired
    Path(fields.nuclei[3]).unlink()
    fields = fields[:4].assign(plate='p')
    before = snapshot(tmp_path)
    checks = check_pairs(fields, n_jobs=1)
    fixed = repair_pairs(fields, checks, tmp_path/'out')
    assert {p:b for p,b in snapshot(tmp_path).items() if 'out' not in p.parts}==before
    assert fixed.drop(columns='repaired').iloc[1:].equals(fields.iloc[1:]) and fixed.plate.tolist()==['p']*4
    assert fixed.repaired[0].startswith('cut to the common area') and 'not certain' in fixed.repaired[1] and fixed.repaired[2].startswith('nothing to repair') and 'no such file' in fixed.repaired[3]
    assert sorted(p.name for p in (tmp_path/'out').iterdir())==sorted(f'sim0000_{c}.tif' for c in ('brightfield','nuclei','cytoplasm','label','cells'))
    h,w = (400-abs(m) for m in move)
    row,col = (max(-m,0) for m in move) # what both windows show begins here in the bright-field window
    for c in ('brightfield','nuclei','cytoplasm','label','cells'): # the same place of the scene in every channel
        got = read_image(fixed[c][0])
        assert got.shape==(h,w) and got.dtype==getattr(big, c).dtype and (got==getattr(big, c)[32+row:32+row+h,32+col:32+col+w]).all(), c
        assert image_info(fixed[c][0]).pixel_size==pytest.approx(.345)
    again = check_pairs(fixed[:1], n_jobs=1)
    assert again.verdict[0]=='fit' and np.hypot(again.shift_row[0], again.shift_col[0])<1

def test_repair_refuses(fields, tmp_path):
    table = fields.drop(columns=['label','cells'])[:3]
    for i in range(2):
        for c in ('nuclei','cytoplasm'): spoil(table, i, c, lambda o: np.roll(o, 10, 1))
    for c in ('nuclei','cytoplasm'): spoil(table, 1, c, lambda o: ndi.rotate(o, 1.5, reshape=False, order=1, mode='reflect'))
    checks = check_pairs(table, n_jobs=1)
    before = snapshot(tmp_path)
    same = repair_pairs(table, checks, tmp_path/'in') # the new names would be those of the originals
    assert 'would be written over' in same.repaired[0] and snapshot(tmp_path)==before and same.drop(columns='repaired').equals(table)
    assert 'rotated or enlarged' in same.repaired[1] and 'rotated' in checks.why[1]
    with pytest.raises(FieldsError, match="no column 'shift_row'"): repair_pairs(table, table, tmp_path)
    with pytest.raises(FieldsError, match="'sim0000' was not checked"): repair_pairs(table, checks[1:], tmp_path)
    blocked = tmp_path/'file'
    blocked.write_text('x')
    assert 'not repaired' in repair_pairs(table[:1], checks, blocked/'out').repaired[0]

def test_repair_of_stacks_masks_and_floats(tmp_path, rng):
    "Channels of one file, a bool mask, 64-bit floats"
    big = simulate_field((464,464), seed=int(rng.integers(2**31)), confluence=.6)
    bf,n,label = window(big.brightfield),window(big.nuclei, 12, -7),window(big.label, 12, -7)==2
    write_image(tmp_path/'stack.tif', np.stack([bf,n]))
    tifffile.imwrite(tmp_path/'label.tif', label); tifffile.imwrite(tmp_path/'phase.tif', bf.astype(np.float64))
    table = pd.DataFrame([dict(field='a/1', brightfield=str(tmp_path/'stack.tif#0'), nuclei=str(tmp_path/'stack.tif#1'), label=str(tmp_path/'label.tif'), phase=str(tmp_path/'phase.tif'))])
    fixed = repair_pairs(table, check_pairs(table), tmp_path/'out')
    got = {c:read_image(fixed[c][0]) for c in ('brightfield','nuclei','label','phase')}
    assert (got['brightfield']==bf[:-12,7:]).all() and (got['nuclei']==n[12:,:-7]).all() and (got['label']==label[12:,:-7]).all() and (got['phase']==bf[:-12,7:]).all()
    assert got['label'].dtype==np.uint8 and got['phase'].dtype==np.float32

# ---- cost

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
def test_a_full_field_is_quick_and_small(tmp_path):
    "1440 x 1920, three channels, reading included: processor time (others may use the machine) and memory of a process of its own"
    fields = simulate_fields(tmp_path, 1, seed=1)
    code = f'''import re,time
from cellseg.quality import field_numbers
row = {fields.drop(columns=["label","cells"]).iloc[0].to_dict()!r}
field_numbers(row) # the first call also loads code
t = time.process_time(); field_numbers(row)
t = time.process_time()-t
print(t, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])/2**20)''' # ru_maxrss would be that of this process, if larger
    one = {f'{k}_NUM_THREADS':'1' for k in ('OMP','OPENBLAS','MKL')}
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ|one, timeout=120)
    assert r.returncode==0, r.stderr
    seconds,gb = map(float, r.stdout.split())
    print(seconds, gb)
    assert seconds<1.5 and gb<1
