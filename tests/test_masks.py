"Masks drawn by hand or by other programs"
import json
import numpy as np, pandas as pd, pytest
from scipy import stats
from cellseg.core import ImageError
from cellseg.io import read_image, write_image
from cellseg.masks import mask_fields, merge_masks, read_mask

def _polygon(rng, centre, radius, n=60):
    "Corners (x,y) of a rough outline"
    a = np.linspace(0, 2*np.pi, n, endpoint=False)
    r = radius*(1+.2*np.sin(3*a+rng.uniform(0,6)))
    return np.stack([centre[1]+r*np.cos(a), centre[0]+r*np.sin(a)], 1)

def _area(p): x,y = p.T; return .5*abs((x*np.roll(y,-1)-y*np.roll(x,-1)).sum())

def test_outlines_of_three_kinds_give_the_same_mask(tmp_path, rng):
    "GeoJSON, LabelMe and ImageJ, written as their programs do; the area is that of the polygons in closed form"
    roifile = pytest.importorskip('roifile')
    polygons = [_polygon(rng, rng.uniform(50,70,2), 25),_polygon(rng, rng.uniform(130,150,2), 30)]
    feature = lambda p: dict(type='Feature', properties={}, geometry=dict(type='Polygon', coordinates=[[*p.tolist(),p[0].tolist()]]))
    (tmp_path/'a.geojson').write_text(json.dumps(dict(type='FeatureCollection', features=[feature(p) for p in polygons])))
    (tmp_path/'list.json').write_text(json.dumps([feature(p) for p in polygons]))
    (tmp_path/'multi.json').write_text(json.dumps(dict(type='MultiPolygon', coordinates=[feature(p)['geometry']['coordinates'] for p in polygons])))
    (tmp_path/'b.json').write_text(json.dumps(dict(shapes=[dict(label='cell', points=p.tolist()) for p in polygons])))
    roifile.roiwrite(tmp_path/'c.zip', [roifile.ImagejRoi.frompoints(p) for p in polygons])
    masks = {f:read_mask(tmp_path/f, (200,220)) for f in ('a.geojson','list.json','multi.json','b.json','c.zip')}
    for f,m in masks.items():
        assert m.shape==(200,220) and (m!=masks['a.geojson']).mean()<1e-3, f # ImageJ keeps single precision
        assert m.sum()==pytest.approx(sum(map(_area, polygons)), rel=.02)
    centre = np.argwhere(masks['a.geojson'][:100]).mean(0)+.5 # centres of pixels lie at .5
    assert centre==pytest.approx(polygons[0].mean(0)[::-1], abs=1.5)

@pytest.mark.parametrize('text', ['', '{', '{"type":"Feature"}', '{"type":"LineString","coordinates":[[1,2],[3,4]]}', '[1,2]', '{"shapes":[{"label":"x"}]}', 'null'])
def test_broken_outlines_are_named(tmp_path, text):
    (tmp_path/'x.json').write_text(text)
    with pytest.raises(ImageError, match='x.json holds no outlines'): read_mask(tmp_path/'x.json', (50,50))
    with pytest.raises(ImageError, match='no such file'): read_mask(tmp_path/'y.json', (50,50))

def test_votes_are_the_mode(rng):
    "Against scipy's most frequent value, wherever it has more than half of the votes"
    labels = rng.integers(0, 3, (5,40,50))
    mode,count = stats.mode(labels, axis=0)
    np.testing.assert_array_equal(merge_masks(labels), np.where(count>2.5, mode, 255))

def test_fields_of_masks(tmp_path, rng):
    shape = (80,90)
    write_image(tmp_path/'bf.tif', rng.integers(0, 999, shape).astype(np.uint16), pixel_size=.5)
    outline = _polygon(rng, (40,45), 25)
    (tmp_path/'cell.geojson').write_text(json.dumps(dict(type='Polygon', coordinates=[outline.tolist()])))
    nucleus = np.zeros(shape, np.float32); nucleus[35:45,40:52] = 7
    write_image(tmp_path/'nuclei.tif', nucleus)
    write_image(tmp_path/'small.tif', nucleus[:50])
    row = dict(brightfield=str(tmp_path/'bf.tif'), cell_mask=str(tmp_path/'cell.geojson'), nuclei_mask=str(tmp_path/'nuclei.tif'))
    fields = pd.DataFrame([dict(field='a')|row, dict(field='b')|row|dict(nuclei_mask=str(tmp_path/'small.tif')), dict(field='c')|row|dict(cell_mask=str(tmp_path/'gone.json'))])
    done = mask_fields(fields, tmp_path/'out')
    label = read_image(done.label[0])
    assert (label==2).sum()==120 and (label>0).sum()==pytest.approx(_area(outline), rel=.03)
    assert done.label[1:].isna().all() and '(50, 90)' in done.problem[1] and 'gone.json: no such file' in done.problem[2]
