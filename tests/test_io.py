"Images written and read again by others, damaged files, full discs, real files"
import logging, shutil, subprocess, sys, textwrap
from pathlib import Path
import numpy as np, pytest, tifffile
from cellseg.core import ImageError
from cellseg.io import image_info, read_grey, read_image, write_image

real = Path(__file__).parents[2]/'shared'/'data'
needs_real = pytest.mark.skipif(not real.is_dir(), reason=f'no real images beside the repository ({real.name}/)')
logging.getLogger('tifffile').setLevel(logging.CRITICAL) # it also logs what we raise

def some(rng, shape, dtype):
    if np.dtype(dtype).kind=='f': return rng.normal(0, 100, shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)

dtypes = ('uint8','uint16','float32')

# Round trips

@pytest.mark.parametrize('dtype', dtypes)
@pytest.mark.parametrize('codec', ('deflate','lzw',None))
@pytest.mark.parametrize('lead', ((), (2,), (3,), (4,), (7,)))
@pytest.mark.parametrize('ext', ('.tif','.TIFF','.ome.tif'))
def test_tiff_round_trip(tmp_path, rng, dtype, codec, lead, ext):
    h,w = rng.integers(2, 60, 2)
    img,size = some(rng, (*lead,h,w), dtype),float(f'{rng.uniform(.05, 2):.4g}')
    path = tmp_path/f'a{ext}'
    write_image(path, img, pixel_size=size, compression=codec)
    back,info = read_image(path),image_info(path)
    assert back.dtype==img.dtype and np.array_equal(back, img)
    assert (info.shape,info.dtype,info.pixel_size)==(img.shape,img.dtype,pytest.approx(size, rel=1e-5))
    sitk = pytest.importorskip('SimpleITK')
    other = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO='TIFFImageIO'))
    assert other.dtype==img.dtype and np.array_equal(other, img)
    with tifffile.TiffFile(path) as t: assert len({p.compression for p in t.pages})==1 and t.pages[0].compression=={'deflate':8,'lzw':5,None:1}[codec]

@pytest.mark.parametrize('dtype', dtypes[:2])
@pytest.mark.parametrize('lead', ((), (3,), (4,)))
def test_png_round_trip(tmp_path, rng, dtype, lead):
    img = some(rng, (*lead,*rng.integers(2, 60, 2)), dtype)
    write_image(tmp_path/'a.png', img)
    back = read_image(tmp_path/'a.png')
    assert back.dtype==img.dtype and np.array_equal(back, img)
    assert image_info(tmp_path/'a.png')[:2]==(img.shape,img.dtype)
    sitk = pytest.importorskip('SimpleITK')
    other = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path/'a.png')))
    assert other.dtype==img.dtype and np.array_equal(np.moveaxis(other, -1, 0) if lead else other, img)

@pytest.mark.parametrize('lead', ((), (3,)))
def test_jpeg_is_near(tmp_path, lead):
    from PIL import Image
    y,x = np.mgrid[:40,:56]
    img = np.uint8(120+60*np.sin(x/9)*np.cos(y/7)) if not lead else np.uint8([2*x+y, 3*y, 255-2*x])
    write_image(tmp_path/'a.jpg', img)
    back = read_image(tmp_path/'a.jpg')
    other = np.asarray(Image.open(tmp_path/'a.jpg'))
    assert back.shape==img.shape and abs(back.astype(int)-img).mean()<3
    assert abs((np.moveaxis(other, -1, 0) if lead else other).astype(int)-back).max()<=2
    assert image_info(tmp_path/'a.jpg').shape==img.shape

def test_same_image_same_bytes(tmp_path, rng):
    img = some(rng, (2,30,40), 'uint16')
    view = img.astype('>u2')[:,:,::-1] # bytes swapped, columns backwards: still the same image once it is turned
    for ext in ('.tif','.ome.tif','.png'):
        a = img[0] if ext=='.png' else img
        b = view[0,:,::-1] if ext=='.png' else view[:,:,::-1]
        write_image(tmp_path/f'a{ext}', a); write_image(tmp_path/'other'/f'b{ext}', b)
        assert (tmp_path/f'a{ext}').read_bytes()==(tmp_path/'other'/f'b{ext}').read_bytes()

# Files of others

@pytest.mark.parametrize('axes,shape', [('CYX',(2,20,30)), ('ZYX',(5,20,30)), ('TYX',(3,20,30)), ('TCZYX',(1,3,1,20,30))])
@pytest.mark.parametrize('kind', (dict(ome=True), dict(imagej=True), dict(ome=True, compression='lzw'), dict(ome=True, tile=(16,16)), dict(ome=True, byteorder='>')))
def test_hyperstacks(tmp_path, rng, axes, shape, kind):
    if 'imagej' in kind and axes=='TCZYX': shape,axes = (3,20,30),'CYX'
    img = some(rng, shape, 'uint16')
    ps = dict(PhysicalSizeX=250., PhysicalSizeXUnit='nm', PhysicalSizeY=250., PhysicalSizeYUnit='nm') if 'ome' in kind else dict(unit='um')
    tifffile.imwrite(tmp_path/'a.tif', img, photometric='minisblack', metadata=dict(axes=axes)|ps, resolution=(4,4), **kind)
    img = img.squeeze()
    assert np.array_equal(read_image(tmp_path/'a.tif'), img) and read_image(tmp_path/'a.tif').dtype==np.dtype('uint16')
    i = int(rng.integers(len(img)))
    for got in (read_image(tmp_path/'a.tif', channel=i), read_image(f'{tmp_path}/a.tif#{i}'), read_grey(f'{tmp_path}/a.tif#{i}')):
        assert np.array_equal(got, img[i])
    if 'Z' in axes[:1] or 'T' in axes[:1] and len(axes)==3: assert np.array_equal(read_image(tmp_path/'a.tif', plane=i), img[i])
    else:
        with pytest.raises(ImageError, match='no plane 1: there is 1'): read_image(tmp_path/'a.tif', plane=1)
    assert image_info(tmp_path/'a.tif').pixel_size==.25
    with pytest.raises(ImageError, match=f'no channel {len(img)}: there are {len(img)}'): read_image(tmp_path/'a.tif', channel=len(img))
    with pytest.raises(ImageError, match=f'a.tif.* no channel 9'): image_info(f'{tmp_path}/a.tif#9')

@pytest.mark.parametrize('axes,shape', [('ZCYX',(4,2,20,30)), ('TCYX',(4,2,20,30)), ('CZYX',(2,4,20,30))])
def test_planes_and_channels(tmp_path, rng, axes, shape):
    img = some(rng, shape, 'uint8')
    tifffile.imwrite(tmp_path/'a.tif', img, photometric='minisblack', metadata=dict(axes=axes))
    pc = img if axes[1]=='C' else img.swapaxes(0,1) # (plane,channel,H,W)
    with pytest.raises(ImageError, match='4 planes'): read_image(tmp_path/'a.tif')
    with pytest.raises(ImageError, match='4 planes'): read_image(tmp_path/'a.tif', channel=1)
    with pytest.raises(ImageError, match='no plane 4: there are 4'): read_image(tmp_path/'a.tif', plane=4)
    with pytest.raises(ImageError, match='no plane -1'): read_image(tmp_path/'a.tif', plane=-1)
    assert np.array_equal(read_image(tmp_path/'a.tif', plane=3), pc[3])
    assert np.array_equal(read_image(tmp_path/'a.tif', plane=2, channel=1), pc[2,1])
    assert np.array_equal(read_image(f'{tmp_path}/a.tif#0', plane=2), pc[2,0])

def test_more_axes_than_a_field_has(tmp_path, rng):
    for axes,shape in (('TZCYX',(2,3,2,8,9)), ('TZYX',(2,3,8,9))):
        tifffile.imwrite(tmp_path/'a.tif', some(rng, shape, 'uint8'), photometric='minisblack', metadata=dict(axes=axes))
        with pytest.raises(ImageError, match=f'{axes}.*save one plane'): read_image(tmp_path/'a.tif', plane=0)

def test_loose_pages_and_colours(tmp_path, rng):
    pages = some(rng, (3,20,30), 'uint16')
    for p in pages: tifffile.imwrite(tmp_path/'pages.tif', p, append=True, metadata=None)
    assert np.array_equal(read_image(tmp_path/'pages.tif'), pages)
    assert np.array_equal(read_image(tmp_path/'pages.tif', plane=1), pages[1])
    rgb = some(rng, (20,30,3), 'uint8')
    tifffile.imwrite(tmp_path/'rgb.tif', rgb, photometric='rgb')
    tifffile.imwrite(tmp_path/'planar.tif', np.moveaxis(rgb, -1, 0).copy(), photometric='rgb', planarconfig='separate')
    for f in ('rgb.tif','planar.tif'):
        assert np.array_equal(read_image(tmp_path/f), np.moveaxis(rgb, -1, 0))
        with pytest.raises(ImageError, match=r'colour image \(3, 20, 30\).*rgb.tif#0|planar.tif#0'): read_grey(tmp_path/f)
        assert np.array_equal(read_grey(f'{tmp_path}/{f}#1'), rgb[...,1])
    tifffile.imwrite(tmp_path/'frames.tif', np.stack([rgb]*4), photometric='rgb')
    assert np.array_equal(read_image(tmp_path/'frames.tif', plane=1, channel=2), rgb[...,2])

@pytest.mark.parametrize('mode', ('1','L','LA','P','RGB','RGBA','I;16'))
def test_png_kinds(tmp_path, rng, mode):
    from PIL import Image
    img = Image.fromarray(some(rng, (20,30,3), 'uint8'))
    img = Image.fromarray(some(rng, (20,30), 'uint16')) if mode=='I;16' else img.convert(mode)
    img.save(tmp_path/'a.png')
    want = np.asarray(img.convert('RGB') if mode=='P' else img.convert('L') if mode=='1' else img)
    got = read_image(tmp_path/'a.png')
    assert np.array_equal(got, want if want.ndim==2 else np.moveaxis(want, -1, 0)) and got.dtype==want.dtype
    assert image_info(tmp_path/'a.png')[:2]==(got.shape,got.dtype)

def test_content_wins_over_name(tmp_path, rng):
    img = some(rng, (20,30), 'uint8')
    write_image(tmp_path/'a.png', img)
    (tmp_path/'a.png').rename(tmp_path/'a.tif')
    (tmp_path/'b.tif#1').write_bytes((tmp_path/'a.tif').read_bytes()) # a real name with a sharp in it
    tifffile.imwrite(tmp_path/'b.tif', np.stack([img, 255-img]), photometric='minisblack')
    assert np.array_equal(read_image(tmp_path/'a.tif'), img)
    assert np.array_equal(read_image(tmp_path/'b.tif#1'), img)
    with pytest.raises(ImageError, match='names a channel already'): read_image(tmp_path/'b.tif#0', channel=1)

def test_pixel_size_is_not_invented(tmp_path):
    img = np.zeros((8,9), np.uint8)
    def size(**k): tifffile.imwrite(tmp_path/'a.tif', img, **k); return image_info(tmp_path/'a.tif').pixel_size
    assert size() is None
    assert size(resolution=(72,72), resolutionunit='INCH') is None
    assert size(resolution=(28.35,28.35), resolutionunit='CENTIMETER') is None # 72 dots per inch again
    assert size(resolution=(2e4,2e4), resolutionunit='CENTIMETER')==.5
    assert size(resolution=(2e4,1e4), resolutionunit='CENTIMETER') is None # not square
    assert size(imagej=True, resolution=(2,2)) is None
    assert size(imagej=True, resolution=(2,2), metadata=dict(unit='pixel')) is None
    assert size(imagej=True, resolution=(2,2), metadata=dict(unit='\\u00B5m'))==.5
    assert size(ome=True, metadata=dict(PhysicalSizeX=1, PhysicalSizeXUnit='reference frame')) is None

# Bad files

tiffs = dict(plain={}, pages=dict(metadata=None), packed=dict(compression='zlib', rowsperstrip=2), ome=dict(ome=True), imagej=dict(imagej=True),
    tiled=dict(tile=(16,16), compression='lzw'), big=dict(bigtiff=True), swapped=dict(byteorder='>'))

@pytest.mark.parametrize('name', [*tiffs,'png','jpg'])
def test_cut_off_anywhere(tmp_path, rng, name):
    "A cut file is an error or, where only its last words are lost, the same image: never another image, never another error"
    img,path = some(rng, (3,6,8), 'uint8' if name=='jpg' else 'uint16'),tmp_path/('a.'+(name if name in ('png','jpg') else 'tif'))
    if name in tiffs: tifffile.imwrite(path, img, photometric='minisblack', **tiffs[name])
    else: write_image(path, img)
    data,whole,errors = path.read_bytes(),read_image(path),0
    for n in range(len(data)):
        path.write_bytes(data[:n])
        try: assert np.array_equal(read_image(path), whole), f'cut at {n} of {len(data)}'
        except ImageError as e: errors += 1; assert str(path) in str(e)
    assert errors>len(data)/2

@pytest.mark.parametrize('name', [*tiffs,'png','jpg'])
def test_damaged_bytes(tmp_path, rng, name):
    "Whatever is wrong with a header, the error is ours"
    img,path = some(rng, (3,30,40), 'uint8' if name=='jpg' else 'uint16'),tmp_path/('a.'+(name if name in ('png','jpg') else 'tif'))
    if name in tiffs: tifffile.imwrite(path, img, photometric='minisblack', **tiffs[name])
    else: write_image(path, img)
    data,errors = path.read_bytes(),0
    for _ in range(60):
        bad = bytearray(data)
        for i in rng.integers(0, 400, 4): bad[i] = rng.integers(256)
        path.write_bytes(bad)
        for f in (read_image,image_info):
            try: f(path)
            except ImageError as e: errors += 1; assert str(path) in str(e)
    assert errors

def test_pages_in_a_circle(tmp_path):
    "The last page names the first one as its next: without a look at the chain a reader never ends"
    code = textwrap.dedent('''
        import shutil, sys, struct, tifffile, numpy as np
        from cellseg.io import read_image, ImageError
        for i in range(2): tifffile.imwrite(sys.argv[1], np.zeros((9,9), 'u1'), append=True, metadata=None)
        with tifffile.TiffFile(sys.argv[1]) as t: first,at = t.pages[0].offset,t.pages.next_page_offset
        with open(sys.argv[1], 'r+b') as f: f.seek(at); f.write(struct.pack('<I', first))
        try: read_image(sys.argv[1])
        except ImageError as e: print('told:', e)''')
    out = subprocess.run([sys.executable, '-c', code, tmp_path/'a.tif'], capture_output=True, text=True, timeout=60)
    assert 'told:' in out.stdout, out

@pytest.mark.parametrize('name,data,why', [('a.tif',b'','empty'), ('a.tif',b'hello\n','not an image'), ('a.png',b'','empty'), ('a.xyz',b'1,2','TIFF, PNG and JPEG'),
    ('a.jpg',b'\xff\xd8\xff','decoded'), ('a.tif',b'II*\0','decoded'), ('a.tif',b'II*\0\x08\0\0\0\0\0','decoded')])
def test_no_image(tmp_path, name, data, why):
    (tmp_path/name).write_bytes(data)
    for f in (read_image,read_grey,image_info):
        with pytest.raises(ImageError, match=f'{name}.*{why}'): f(tmp_path/name)

def test_absent(tmp_path):
    for p in ('a.tif','a.tif#1','no/a.tif','a.czi','x'*300+'.tif'):
        with pytest.raises(ImageError, match='no such file'): read_image(tmp_path/p)
    with pytest.raises(ImageError, match='is a folder'): read_image(tmp_path)

@pytest.mark.parametrize('bad', (np.nan, np.inf, -np.inf))
def test_not_a_number(tmp_path, bad):
    img = np.random.default_rng().normal(size=(9,9)).astype('float32')
    img[2:4,5] = bad
    write_image(tmp_path/'a.tif', img)
    assert np.array_equal(read_image(tmp_path/'a.tif'), img, equal_nan=True)
    with pytest.raises(ImageError, match='a.tif has 2 pixels of 81'): read_grey(tmp_path/'a.tif')

# Writing that fails

@pytest.mark.parametrize('ext', ('.tif','.ome.tif','.png'))
def test_full_disc_keeps_the_old_file(tmp_path, ext):
    "The largest file a process may write stands in for a full disc"
    path = tmp_path/f'a{ext}'
    write_image(path, np.full((20,30), 7, np.uint8))
    code = textwrap.dedent(f'''
        import resource, numpy as np
        from cellseg.io import write_image, ImageError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try: write_image({str(path)!r}, np.random.default_rng().integers(0, 65536, (700,700), dtype=np.uint16))
        except ImageError as e: print('told:', e)''')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert f'told: {path} could not be written' in out.stdout, out
    assert [p.name for p in tmp_path.iterdir()]==[path.name] and (read_image(path)==7).all()

def test_target_folder_is_a_file(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(ImageError, match='not a folder'): write_image(tmp_path/'file'/'a.tif', np.zeros((4,4), np.uint8))
    assert [p.name for p in tmp_path.iterdir()]==['file']

@pytest.mark.parametrize('dtype', ('bool','int8','int16','int32','uint32','int64','float16','float64','complex64'))
@pytest.mark.parametrize('ext', ('.tif','.png'))
def test_other_types_are_refused(tmp_path, dtype, ext):
    with pytest.raises(ImageError, match=f'a{ext}.*{dtype}.*astype'): write_image(tmp_path/f'a{ext}', np.ones((4,4), dtype))
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('size', (0, -1, float('nan'), float('inf')))
def test_impossible_pixel_sizes(tmp_path, size):
    with pytest.raises(ImageError, match='pixel size'): write_image(tmp_path/'a.tif', np.zeros((4,4), np.uint8), pixel_size=size)

# Other formats

def test_ome_zarr(tmp_path, rng):
    from ome_zarr.format import FormatV04, FormatV05
    from ome_zarr.writer import write_image as write_ome
    for fmt in (FormatV04(),FormatV05()):
        img,path = some(rng, (2,40,50), 'uint16'),tmp_path/f'a{fmt.version}.ome.zarr'
        write_ome(img, str(path), axes='cyx', scale=dict(c=1, y=325, x=325), axes_units=dict(y='nanometer', x='nanometer'), scale_factors=[2], fmt=fmt)
        assert np.array_equal(read_image(path), img)
        assert np.array_equal(read_grey(f'{path}#1'), img[1])
        assert image_info(path)==(img.shape, img.dtype, 'CYX', .325)
        shutil.copytree(path, inside := tmp_path/f'plate{fmt.version}'/'A'/'1'/'0') # as inside a plate: no .zarr in its name
        assert np.array_equal(read_image(inside), img)
    (tmp_path/'b.zarr').mkdir()
    with pytest.raises(ImageError, match='b.zarr could not be decoded'): read_image(tmp_path/'b.zarr')

def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'bioio', None) # as if it were not installed
    (tmp_path/'a.czi').write_bytes(b'ZISRAWFILE')
    with pytest.raises(ImageError, match=r"a.czi.*pip install 'cellseg\[formats\]'"): read_image(tmp_path/'a.czi')

# Real files

@needs_real
@pytest.mark.parametrize('pattern,n,shape,dtype', [
    ('cellpainting_bf/*.tiff', 3, (1080,1080), 'uint16'), ('brifiseg/*_BF.tif', 5, (512,512), 'float32'), ('brifiseg/*_nuclei.tif', 5, (512,512), 'uint8'),
    ('isl_neuron/*.png', 7, (1024,1024), 'uint16'), ('nf1/*_001.tif', 15, (904,1224), 'uint16'), ('nf1/*_Mask*.tiff', 15, (904,1224), 'uint8'),
    ('neubias/*dapi*.tif', 1, (2,730,968), 'uint8'), ('neubias/*cecog*.tif', 1, (2,1040,1392), 'uint8'), ('sbs_plate/*.tif', 48, (640,640), 'uint8')])
def test_real_files(pattern, n, shape, dtype):
    files = sorted(real.glob(pattern))
    assert len(files)==n
    for f in files:
        img = read_image(f)
        assert img.shape==image_info(f).shape==shape and img.dtype==image_info(f).dtype==np.dtype(dtype) and img.min()<img.max()
        if len(shape)==3:
            assert np.array_equal(read_grey(f'{f}#1', varied=True), img[1])
            with pytest.raises(ImageError, match='several channels'): read_grey(f)

@needs_real
def test_real_pixel_sizes():
    assert image_info(real/'neubias'/'xyc_8bit__dapi_tublin.tif').pixel_size==.454 # its Zeiss metadata say 0.227 µm, at half this size
    assert image_info(next((real/'cellpainting_bf').glob('*.tiff'))).pixel_size is None # a print resolution: 64.5 µm

@needs_real
def test_real_files_as_others_read_them():
    sitk = pytest.importorskip('SimpleITK')
    for f in [*real.glob('cellpainting_bf/*.tiff'), *real.glob('brifiseg/*001*.tif'), *sorted(real.glob('isl_neuron/*.png'))[:2], *sorted(real.glob('nf1/*'))[:4]]:
        assert np.array_equal(read_image(f), sitk.GetArrayFromImage(sitk.ReadImage(str(f)))), f.name
