"Patterns on real folders and on random ones, tables kept and read again, folds, tiles"
import re, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest
from cellseg.core import FieldsError, ImageError
from cellseg.fields import absolute_paths, check_leaks, find_fields, image_columns, kfold_fields, load_fields, natural, same_size, save_fields, tile_fields, whole_folds
from cellseg.io import image_info, read_grey, write_image

real = Path(__file__).parents[2]/'shared'/'data'
needs_real = pytest.mark.skipif(not real.is_dir(), reason='no real images beside the repository')

def touch(folder, *names):
    for o in names: (folder/o).parent.mkdir(parents=True, exist_ok=True); (folder/o).touch()
    return folder

# Real folders

real_fields = [
    ('cellpainting_bf', 'r{row}c{col}f{site}p{plane}-ch{channel}sk1fk1fl1.tiff', dict(brightfield='1', cytoplasm='3', nuclei='5'), 1, '03_03_03_01'),
    ('brifiseg', 'A549_{field}_{channel}.tif', dict(brightfield='BF', label='nuclei'), 5, '001'),
    ('isl_neuron', '*condition-{condition},*well-{well},*-STITCHED,{channel},is_mask-false.png',
        dict(brightfield='z_depth-6,*', z2='z_depth-2,*', z10='z_depth-10,*', nuclei='*DAPI*', cytoplasm='*MAP2*'), 1, 'KEVAN_0_8_A4'),
    ('nf1', '{well}_01_*_{site}_{channel}_001.tif', dict(nuclei='DAPI', gfp='GFP', cytoplasm='RFP'), 5, 'B7_3'),
    ('nf1', '{well}_01_*_{site}_{channel}.*', dict(nuclei='DAPI_001', cytoplasm='RFP_001', nuclei_mask='*MaskNuclei', cell_mask='*MaskCells'), 5, 'B7_3'),
    ('neubias', 'xyc_8bit__{field}.tif', {'first':0, 'second':1}, 2, 'dapi_tublin'),
    ('sbs_plate', 'Channel{channel}-*-{row}-{col}.tif', dict(cytoplasm=1, nuclei=2), 24, 'A_01')]

@needs_real
@pytest.mark.parametrize('folder,pattern,channels,n,first', real_fields)
def test_real_folders(folder, pattern, channels, n, first):
    with warnings.catch_warnings():
        warnings.simplefilter('error') # no field lacks a channel
        fields = find_fields(real/folder, pattern, channels)
    assert len(fields)==n and fields.field[0]==first and fields.field.is_unique
    assert image_columns(fields)==list(channels)
    paths = fields[list(channels)].to_numpy().ravel()
    assert len(set(paths))==n*len(channels)
    for f in fields.to_dict('records'): assert same_size(f[c] for c in channels)==read_grey(f[next(iter(channels))]).shape
    for c,v in channels.items(): # the channel's value stands in the file name
        if isinstance(v, str): assert all(v.strip('*') in Path(o).name for o in fields[c])

# Random folders

def test_random_names_are_found_again(tmp_path, rng):
    letters = list('abcXYZ0189-+ .éß()')
    def word(): return ''.join(rng.choice(letters, rng.integers(1, 5)))
    for case in range(25):
        parts = [f'p{i}' for i in range(rng.integers(1, 5))]+['channel']
        order = [str(o) for o in rng.permutation(parts)]
        seps = [str(o) for o in rng.choice(['_','__','/','_[x]_','_$','_^'], len(order)-1)] # never inside a word
        pattern = ''.join(f'{{{p}}}{s}' for p,s in zip(order, seps+['.tif'])).replace('.tif', '_.tif')
        rows,want = {},{'a':'ch1','b':'c.2'}
        for key in {tuple(word().strip('. ') or '0' for _ in parts[:-1]) for _ in range(12)}:
            rows[key] = {c:dict(zip(parts, (*key,v))) for c,v in want.items()}
        folder = tmp_path/str(case)
        for row in rows.values():
            for o in row.values(): touch(folder, re.sub(r'\{(\w+)\}', lambda m: o[m[1]], pattern))
        fields = find_fields(folder, pattern, want)
        shown = [p for p in order if p!='channel']
        got = {tuple(r[p] for p in parts[:-1]):r for r in fields.to_dict('records')}
        assert set(got)==set(rows) and len(fields)==len(rows)
        for key,r in got.items():
            assert r['field']=='_'.join(dict(zip(parts, key))[p] for p in shown)
            for c,o in rows[key].items(): assert Path(r[c])==folder/re.sub(r'\{(\w+)\}', lambda m: o[m[1]], pattern)

def test_natural_order(tmp_path, rng):
    names = [f'{r}{c}' for r in 'ABC' for c in range(1, 13)]
    touch(tmp_path, *(f'{o}.tif' for o in rng.permutation(names)))
    assert list(find_fields(tmp_path, '{well}.tif', dict(brightfield=None)).well)==names
    assert sorted(['10','x²','2','x','1'], key=natural)==['1','2','10','x','x²'] # no digit that int() refuses

def test_sub_folders(tmp_path):
    touch(tmp_path, 'top_1.tif', 'a/mid_1.tif', 'a/b/c/deep_1.tif', '.hidden/no_1.tif', 'a/._mid_1.tif', 'z/w.zarr/0/0_1.tif')
    found = lambda p: set(find_fields(tmp_path, p, dict(bf='1')).field)
    assert found('**/{field}_{channel}.tif')=={'top','mid','deep'}
    assert found('{field}_{channel}.tif')=={'top'}
    assert found('*/{field}_{channel}.tif')=={'mid'}
    assert found('./a/**/{field}_{channel}.tif')=={'mid','deep'}
    assert set(find_fields(tmp_path, '**/{field}.zarr', dict(bf=0)).bf)=={f'{tmp_path}/z/w.zarr#0'}

def test_capitals_and_signs_are_literal(tmp_path):
    touch(tmp_path, 'a(1)+[x].tif', 'A(1)+[x].TIF')
    assert list(find_fields(tmp_path, '{field}(1)+[x].tif', dict(bf=0)).field)==['a']
    with pytest.raises(FieldsError, match='fits up to'): find_fields(tmp_path, '{field}(2)+[x].tif', dict(bf=0))

def test_missing_channels_stay_and_are_told_once(tmp_path):
    touch(tmp_path, *(f'{i}_bf.tif' for i in range(9)), '3_dna.tif')
    with pytest.warns(UserWarning, match=r'8 of 9 fields lack a channel: 0 \(nuclei\); 1 \(nuclei\).*\.\.\.') as w:
        fields = find_fields(tmp_path, '{field}_{channel}.tif', dict(brightfield='bf', nuclei='dna'))
    assert len(w)==1 and w[0].filename==__file__
    assert len(fields)==9 and [o is None for o in fields.nuclei]==[i!=3 for i in range(9)]

@pytest.mark.parametrize('pattern,channels,why', [
    ('{field}_{channel}.png', dict(a='x'), r"'\{field\}_\{channel\}.png'.*up to '\{field\}_\{channel\}', but '.png' does not.*3 files: 1_x.tif, 1_y.tif, 2_x.tif"),
    ('{field}_{channel}.tif', dict(a='x', b='DAPI'), 'no file is b.*are x, y'),
    ('*_{channel}.tif', dict(a='x'), '1_x.tif and .*2_x.tif'),
    ('{field}_{channel}.tif', dict(a='x', b='*'), 'fits both a and b'),
    ('{field}_*.tif', dict(a=0), '1_x.tif.* and .*1_y.tif'), ('{field}.tif', dict(a=0, b=0), 'same in the file'), ('{field}.tif', dict(a='x'), 'number'),
    ('{field}_{channel}.tif', {}, 'which is which'), ('{field}_{channel}.tif', 'bf', 'which is which'), ('{field}_{channel}.tif', {'my bf':'x'}, 'letters'),
    ('{field}_{channel}.tif', dict(field='x'), 'letters'), ('{a}_{channel}.tif', dict(a='x'), 'no part of'), ('{label}_{channel}.tif', dict(a='x'), 'label'),
    ('{1a}_{channel}.tif', dict(a='x'), 'no part'), ('{}_{channel}.tif', dict(a='x'), 'no part'), ('{a_{channel}.tif', dict(a='x'), 'no part')])
def test_bad_patterns(tmp_path, pattern, channels, why):
    touch(tmp_path, '1_x.tif', '1_y.tif', '2_x.tif')
    with pytest.raises(FieldsError, match=why): find_fields(tmp_path, pattern, channels)

def test_bad_folders(tmp_path):
    touch(tmp_path, 'file', 'in/sub/a_x.tif'); (tmp_path/'void').mkdir()
    for name,why in dict(nowhere='no such folder', file='is a file', void='has no files').items():
        with pytest.raises(FieldsError, match=f'{name}.*{why}'): find_fields(tmp_path/name, '{field}_{channel}.tif', dict(a='x'))
    with pytest.raises(FieldsError, match='sub/a_x.tif'): find_fields(tmp_path/'in', '{field}_{channel}.tif', dict(a='x')) # shows where the files are

def test_ids_that_would_clash(tmp_path):
    touch(tmp_path, 'a_b/c.tif', 'a/b_c.tif')
    with pytest.raises(FieldsError, match="share the id.*'a_b_c'"): find_fields(tmp_path, '{p}/{q}.tif', dict(bf=0))
    touch(tmp_path, 'P1/1.png', 'P2/1.png')
    with pytest.raises(FieldsError, match="'1'"): find_fields(tmp_path, '{plate}/{field}.png', dict(bf=0))

def test_one_field_without_named_parts(tmp_path):
    touch(tmp_path/'day3', 'bf.tif', 'dna.tif')
    assert find_fields(tmp_path/'day3', '{channel}.tif', dict(brightfield='bf', nuclei='dna')).field.tolist()==['day3']

# Tables

def test_table_comes_back(tmp_path, rng):
    texts = ['03','1e5','NA','nan','None','a,b','"q"','ü µ','1.0','true',' x ','-']
    fields = pd.DataFrame(dict(field=[f'f{i}' for i in range(12)], well=rng.permutation(texts), nuclei=[None,'a.tif#1']*6), dtype=object)
    for t in (fields, kfold_fields(fields, k=3)):
        save_fields(t, tmp_path/'new'/'t.csv')
        back = load_fields(tmp_path/'new'/'t.csv')
        assert back.to_dict('records')==t.to_dict('records')
        assert 'fold' not in t or back.fold.dtype.kind=='i'

@pytest.mark.parametrize('data,why', [(b'', 'not a CSV table'), (b'a,b\n1,2\n', 'no column `field`: it has a, b'), (b'field\n', 'no rows'), (b'field,x\na,1\na,2\n', "'a' is missing or there twice"),
    (b'field,x\n,1\n', 'no id'), (b'field\na,b,c\nd\ne,f,g,h,i\n', 'not a CSV table'), (b'\xff\xfe\x00\x80field', 'not a CSV table'), (b'field,fold\na,x\n', 'whole number'), (b'field,fold\na,\n', 'whole number')])
def test_bad_tables(tmp_path, data, why):
    (tmp_path/'t.csv').write_bytes(data)
    with pytest.raises(FieldsError, match=f't.csv.*{why}'): load_fields(tmp_path/'t.csv')

def test_tables_that_cant_be_opened_or_written(tmp_path):
    with pytest.raises(FieldsError, match='No such file'): load_fields(tmp_path/'t.csv')
    (tmp_path/'t').mkdir()
    with pytest.raises(FieldsError, match='t could not be opened'): load_fields(tmp_path/'t')
    touch(tmp_path, 'file')
    with pytest.raises(FieldsError, match='not a folder'): save_fields(pd.DataFrame(dict(field=['a'])), tmp_path/'file'/'t.csv')
    (tmp_path/'bom.csv').write_bytes('field,well\na,03\n'.encode('utf-8-sig'))
    assert load_fields(tmp_path/'bom.csv').to_dict('records')==[dict(field='a', well='03')]

# Folds

def some_fields(rng, n): return pd.DataFrame(dict(field=[f'f{i}' for i in range(n)], well=rng.choice(list('ABCDEFGH'), n)), index=rng.permutation(1000)[:n], dtype=object)

def test_folds(rng):
    for _ in range(20):
        n = int(rng.integers(8, 60)); k = int(rng.integers(2, 7)); seed = int(rng.integers(1000))
        fields = some_fields(rng, n); before = fields.copy()
        f = kfold_fields(fields, k, seed=seed)
        pd.testing.assert_frame_equal(f.drop(columns='fold'), before); assert 'fold' not in fields
        sizes = f.fold.value_counts()
        assert sorted(sizes.index)==list(range(k)) and sizes.max()-sizes.min()<=1 # every field in one fold, folds of one size
        assert f.fold.equals(kfold_fields(fields, k, seed=seed).fold)
        wells = fields.well.nunique()
        if wells<k: continue
        g = kfold_fields(fields, k, group='well', seed=seed)
        assert g.groupby('well').fold.nunique().max()==1 and sorted(g.fold.unique())==list(range(k))
        assert g.fold.equals(kfold_fields(fields, k, group='well', seed=seed).fold)
    big = some_fields(rng, 60)
    for group in (None,'well'): assert len({tuple(kfold_fields(big, 4, group, seed=s).fold) for s in range(8)})>4

def test_folds_that_cant_be(rng):
    fields = some_fields(rng, 6).assign(well=list('AABBCC'), donor=['x']*5+[None], plate='P1')
    for kw,why in [(dict(k=7), '7 folds of 6 fields'), (dict(k=1), 'from 2 to 6'), (dict(k=4, group='well'), '4 folds of 3 different values of well'),
                   (dict(k=2, group='donor'), "'f5' has no donor"), (dict(k=2, group='day'), "no column 'day'.*well, donor"), (dict(k=2, stratify='donor'), "'f5' has no donor"), (dict(k=2, stratify='day'), "no column 'day' to stratify"),
                   (dict(k=3, stratify='well'), 'no value of well occurs 3 times'), (dict(k=2, group='plate'), "all 6 fields have one plate, 'P1'")]:
        with pytest.raises(FieldsError, match=why): kfold_fields(fields, **kw)
    for bad,why in [(fields[:0], 'no rows'), (fields.drop(columns='field'), 'no column'), (fields.assign(field='a'), 'twice'), (fields[:1], 'at least 2')]:
        with pytest.raises(FieldsError, match=why): kfold_fields(bad, k=2)

def test_stratified_folds_keep_the_shares(rng):
    for _ in range(10):
        n,k = int(rng.integers(30, 80)),int(rng.integers(2, 5))
        fields = some_fields(rng, n).assign(line=rng.permutation(['HeLa']*(n//4)+['A549']*(n-n//4)))
        f = kfold_fields(fields, k, stratify='line', seed=int(rng.integers(99)))
        each = f.groupby('fold').line.apply(lambda o: (o=='HeLa').sum())
        assert each.max()-each.min()<=1
        both = kfold_fields(fields, 2, group='well', stratify='line')
        assert both.groupby('well').fold.nunique().max()==1 and both.fold.nunique()==2
    with pytest.warns(UserWarning, match=r"line 'rare' \(1 fields\) can not be in each of 2 folds"):
        f = kfold_fields(some_fields(rng, 9).assign(line=['rare']+['A549']*8), 2, stratify='line')
    assert sorted(f.fold.value_counts())==[4,5]

def test_leaks_are_found_and_only_leaks(rng, tmp_path):
    "Copies under other names, in another format and dtype, of one channel of two; groups on both sides; the same within a fold is none"
    imgs = {n:rng.integers(0, 200, (20,30), dtype=np.uint8) for n in 'abcdef'}
    for n,img in imgs.items(): write_image(tmp_path/f'{n}.tif', img)
    write_image(tmp_path/'g.png', imgs['b'].astype(np.uint16)); write_image(tmp_path/'h.tif', np.stack([imgs['a'].astype(np.float32),imgs['c'].astype(np.float32)]))
    files = [*(f'{n}.tif' for n in 'abcdef'),'g.png','h.tif#1']
    fields = pd.DataFrame(dict(field=list('ABCDEFGH'), brightfield=[str(tmp_path/o) for o in files], day=[1,1,2,2,3,3,4,5], fold=[0,0,1,1,2,2,1,1]), dtype=object)
    assert check_leaks(fields, 'day').to_numpy().tolist()==[['B','G','the same brightfield image']] # H is C again, but in its fold
    moved = fields.assign(fold=[0,1,1,1,2,2,1,0])
    assert check_leaks(moved, 'day').to_numpy().tolist()==[['A','B','the same day, 1'], ['C','H','the same brightfield image']]
    assert check_leaks(moved, columns=[]).empty
    altered = imgs['b'].copy(); altered[0,0] += 1
    write_image(tmp_path/'g.png', altered)
    assert check_leaks(fields).empty # one grey value differs: another image
    with pytest.raises(ImageError, match='gone.tif'): check_leaks(fields.assign(brightfield=str(tmp_path/'gone.tif')))
    with pytest.raises(FieldsError, match="'A' has no day"): check_leaks(fields.assign(day=[None]*8), 'day')

# Tiles

def test_tiles_hold_every_pixel_once(tmp_path, rng):
    for case in range(6):
        (h,w),(rows,cols) = rng.integers(10, 50, 2),rng.integers(1, 5, 2)
        imgs = dict(bf=rng.integers(0, 65535, (2,h,w), dtype=np.uint16), label=rng.integers(0, 3, (h,w), dtype=np.uint8))
        folder = tmp_path/str(case)
        for c,img in imgs.items(): write_image(folder/f'f_{c}.tif', img, pixel_size=.65)
        fields = pd.DataFrame([dict(field='f', well='B2', brightfield=f'{folder}/f_bf.tif#1', nuclei=None, label=f'{folder}/f_label.tif')])
        t = tile_fields(fields, folder/'tiles', int(rows), int(cols))
        assert list(t.field)==[f'f_r{r}c{c}' for r in range(rows) for c in range(cols)] and set(t.source)=={'f'} and set(t.well)=={'B2'} and t.nuclei.isna().all()
        for column,img in dict(brightfield=imgs['bf'][1], label=imgs['label']).items():
            tiles = [read_grey(o) for o in t[column]]
            assert tiles[0].dtype==img.dtype and {image_info(o).pixel_size for o in t[column]}=={.65}
            assert np.array_equal(np.vstack([np.hstack(tiles[r*cols:(r+1)*cols]) for r in range(rows)]), img)
        if rows*cols>1: assert kfold_fields(t, 2).fold.nunique()==2
        with pytest.raises(FieldsError, match="have one source, 'f'"): kfold_fields(t, 2, group='source')

def test_tiles_of_what_does_not_fit(tmp_path):
    for n,shape in dict(a=(20,30), b=(20,31), c=(3,40)).items(): write_image(tmp_path/f'{n}.tif', np.zeros(shape, np.uint8))
    table = lambda *o: pd.DataFrame([dict(field='f', brightfield=str(tmp_path/o[0]), nuclei=str(tmp_path/o[1]))])
    with pytest.raises(ImageError, match=r'a.tif is \(20, 30\).*b.tif.*\(20, 31\)'): tile_fields(table('a.tif','b.tif'), tmp_path/'t')
    with pytest.raises(ImageError, match='c.tif.*too small'): tile_fields(table('c.tif','c.tif'), tmp_path/'t')
    with pytest.raises(ImageError, match='no such file'): tile_fields(table('a.tif','no.tif'), tmp_path/'t')
    assert not (tmp_path/'t').exists()

def test_ids_stay_in_their_folder(rng):
    for bad in ('../x','a/../../x','/x'):
        with pytest.raises(FieldsError, match='would be a file outside its folder'): kfold_fields(some_fields(rng, 4).assign(field=['a','b','c',bad]), 2)

@pytest.mark.parametrize('fold,good', [([0.,1.,1.],True), (['0','1','1'],True), ([0,.5,1],False), ([0,None,1],False), (['a','b','a'],False)])
def test_folds_are_whole_numbers(rng, fold, good):
    fields = some_fields(rng, 3).assign(fold=fold)
    if good: assert whole_folds(fields).fold.tolist()==[0,1,1]
    else:
        with pytest.raises(FieldsError, match='`fold` must be a whole number'): whole_folds(fields)

def test_absolute_paths_keep_gaps():
    fields = pd.DataFrame(dict(field=['a','b','c'], brightfield=['x.tif','/y.tif','z.tif'], nuclei=['n.tif',None,float('nan')]))
    for f in (fields,absolute_paths(fields),fields.astype({'nuclei':'str'})): # again and again
        out = absolute_paths(f)
        assert out.brightfield.tolist()==[str(Path.cwd()/'x.tif'),'/y.tif',str(Path.cwd()/'z.tif')] and out.nuclei.tolist()==[str(Path.cwd()/'n.tif'),None,None]
