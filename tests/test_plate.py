"Plates: killed and continued, dead workers, bad fields, full discs, OME-Zarr in and out"
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from cellseg.core import CellsegError, FieldsError, seeded
from cellseg.io import read_image, write_image
from cellseg.models.registry import create_model
from cellseg.omezarr import write_zarr_field, write_zarr_plate, zarr_fields
from cellseg.plate import Plate, measure_fields, run_plate
from cellseg.predict import Segmenter

def discs(rng, shape=(300,400), n=8):
    "A label image of cells that do not touch: nuclei of radius 8 in cells of radius 15 on a grid, and their number"
    label,(y,x) = np.zeros(shape, np.uint8),np.ogrid[:shape[0],:shape[1]]
    at = rng.permutation([(r,c) for r in range(30, shape[0]-30, 50) for c in range(30, shape[1]-30, 50)])[:n]
    for r,c in at:
        far = np.hypot(y-r, x-c)
        label[far<15] = 1; label[far<8] = 2
    return label

def plate(folder, n, rng, wells=True, shape=(300,400)):
    "A fields table of n label images; field i has 3 + i%5 cells"
    rows = []
    for i in range(n):
        row = dict(field=f'f{i:03d}', label=str(folder/f'f{i:03d}.tif'))
        if wells: row['well'] = f"{'ABCDEFGH'[i//12]}{i%12+1:02d}"
        write_image(row['label'], discs(rng, shape, 3+i%5), pixel_size=.5)
        rows.append(row)
    return pd.DataFrame(rows)

def segmenter():
    with seeded(0): return Segmenter(create_model('unet'), 'unet', pixel_size=.5)

def bright(folder, n, rng, **kwargs):
    rows = []
    for i in range(n):
        rows.append(dict(field=f'b{i}', well=f'A{i+1}', brightfield=str(folder/f'b{i}.tif')))
        write_image(rows[-1]['brightfield'], rng.normal(1000, 50, (90,110)).astype(np.uint16), pixel_size=.5, **kwargs)
    return pd.DataFrame(rows)

def parts(out): return {p.name:p.stat().st_mtime_ns for p in (out/'parts').glob('*.json')}

def start(tmp_path, n_jobs=2):
    "Measure tmp_path/fields.csv in a process of its own"
    code = f"from cellseg.fields import load_fields; from cellseg.plate import measure_fields\nif __name__=='__main__': print(measure_fields(load_fields({str(tmp_path/'fields.csv')!r}), {str(tmp_path/'out')!r}, n_jobs={n_jobs}))"
    (tmp_path/'go.py').write_text(code)
    return subprocess.Popen([sys.executable, str(tmp_path/'go.py')], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def wait_for(what, seconds=120):
    end = time.time()+seconds
    while not what():
        assert time.time()<end, 'nothing came'
        time.sleep(.02)

def children(pid):
    "Processes below `pid`"
    out = []
    for c in Path(f'/proc/{pid}/task').glob('*/children'):
        for k in map(int, c.read_text().split()): out += [k,*children(k)]
    return out

def is_worker(pid):
    try: return b'spawn_main' in Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError: return False

@pytest.mark.parametrize('whom', ('all','worker'))
def test_killed(tmp_path, rng, whom):
    "SIGKILL of the whole run, then the same call; SIGKILL of a worker, and the run ends as if nothing had been"
    fields,out = plate(tmp_path, 36, rng, shape=(700,900)),tmp_path/'out'
    fields.to_csv(tmp_path/'fields.csv', index=False)
    p = start(tmp_path)
    wait_for(lambda: len(parts(out))>=5 or p.poll() is not None)
    assert p.poll() is None, p.communicate()
    if whom=='all':
        os.kill(p.pid, signal.SIGKILL); p.wait()
        time.sleep(2) # workers end with it
        done = parts(out)
        assert 5<=len(done)<36 and not (out/'cells.parquet').exists()
        p = start(tmp_path)
    else:
        victim = next(k for k in children(p.pid) if is_worker(k))
        os.kill(victim, signal.SIGKILL)
        done = parts(out)
    text,err = p.communicate(timeout=240)
    assert p.returncode==0, err
    assert all(parts(out)[k]==t for k,t in done.items()), 'a field was done twice'
    got = Plate(out)
    assert got.fields.problem.isna().all() and got.fields['count'].tolist()==[3+i%5 for i in range(36)]
    assert len(got.cells())==sum(3+i%5 for i in range(36)) and '36 of 36 fields' in text
    assert not [p for p in out.rglob('.*') if p.name!='.lock'], 'half-written things were left'

def test_a_field_that_kills_its_workers(tmp_path, rng):
    "A field that ends every worker it is given to (as one that needs too much memory) becomes a problem; the others are done"
    import cloudpickle
    from distributed import Client, LocalCluster, WorkerPlugin
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    class Deadly(WorkerPlugin):
        def setup(self, worker):
            import cellseg.plate as P
            write = P.write_zarr_field
            def die(path, *args):
                if 'A/3' not in str(path): return write(path, *args)
                path.with_name(f'.{os.getpid()}-0').mkdir(parents=True); os._exit(1) # in the middle of writing
            P.write_zarr_field = die
    fields = plate(tmp_path, 6, rng)
    with LocalCluster(n_workers=2, threads_per_worker=1, host='127.0.0.1', dashboard_address=None, silence_logs=50) as cluster, Client(cluster) as client:
        client.register_plugin(Deadly())
        with pytest.warns(UserWarning, match='f002: its worker process ended again and again'): got = measure_fields(fields, tmp_path/'out', client=client)
    assert got.problems.field.tolist()==['f002'] and got.fields['count'].dropna().tolist()==[3,4,6,7,3]
    assert not [p for p in (tmp_path/'out').rglob('.*') if p.name!='.lock'], 'half-written things were left'

def test_bad_fields_do_not_stop_the_rest(tmp_path, rng):
    fields = plate(tmp_path, 5, rng)
    whole = Path(fields.label[1]).read_bytes(); Path(fields.label[1]).write_bytes(whole[:len(whole)//2])
    os.remove(fields.label[2]); fields.loc[3,'label'] = None
    with pytest.warns(UserWarning, match='3 of 5 fields could not be measured') as said: got = measure_fields(fields, tmp_path/'out')
    assert all(n in str(said[0].message) for n in ('f001','f002','f003'))
    assert got.problems.field.tolist()==['f001','f002','f003'] and got.fields['count'].dropna().tolist()==[3,7]
    write_image(fields.label[2], discs(rng, n=5)) # put right
    with pytest.warns(UserWarning, match='2 of 5'): got = measure_fields(fields, tmp_path/'out')
    assert got.fields['count'].dropna().tolist()==[3,5,7] and len(got.cells())==15

def test_a_plate_grows_and_another_is_refused(tmp_path, rng):
    fields,out = plate(tmp_path, 4, rng),tmp_path/'out'
    measure_fields(fields[:2], out); before = parts(out)
    got = measure_fields(fields, out)
    assert len(got.fields)==4 and {k:v for k,v in parts(out).items() if k in before}==before
    with pytest.raises(CellsegError, match="'f003' is not in the table"): measure_fields(fields[:3], out)
    with pytest.raises(CellsegError, match='pixel_size is None, here 0.7.*overwrite'): measure_fields(fields, out, pixel_size=.7)
    assert len(Plate(out).fields)==4
    got = measure_fields(fields[:3], out, pixel_size=.7, overwrite=True)
    assert len(got.fields)==3 and len(parts(out))==3
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'config.json').write_text('{}')
    with pytest.raises(CellsegError, match='training run'): measure_fields(fields, tmp_path/'run', overwrite=True)
    with pytest.raises(FieldsError, match='empty'): measure_fields(fields[:0], tmp_path/'o')
    with pytest.raises(FieldsError, match="'truth'"): measure_fields(fields, tmp_path/'o', 'truth')
    with pytest.raises(CellsegError, match='no plate'): Plate(tmp_path)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()!=0, reason='only root can make a disc of 2 MB')
def test_full_disc(tmp_path, rng):
    "The disc fills up in the middle: what is done stays, and more room is all that the same call needs"
    fields = plate(tmp_path, 30, rng, shape=(500,600))
    (tmp_path/'small').mkdir()
    if subprocess.run(['mount','-t','tmpfs','-o','size=600k','tmpfs',str(tmp_path/'small')], capture_output=True).returncode: pytest.skip('no disc could be mounted')
    try:
        out = tmp_path/'small'/'out'
        with pytest.raises(CellsegError, match=r'the disc is full. (\d+) of 30 fields are done and kept') as e: measure_fields(fields, out, n_jobs=1)
        n = int(re.search(r'(\d+) of 30', str(e.value))[1])
        assert 0<n<30 and len(parts(out))==n
        before = parts(out)
        subprocess.run(['mount','-o','remount,size=60m',str(tmp_path/'small')], check=True)
        got = measure_fields(fields, out, n_jobs=1)
        assert len(got.fields)==30 and got.fields.problem.isna().all() and {k:v for k,v in parts(out).items() if k in before}==before
    finally: subprocess.run(['umount',str(tmp_path/'small')], check=True)

def test_run_plate_from_and_to_ome_zarr(tmp_path, rng):
    "An OME-Zarr plate in, one out; ome-zarr-py reads it; a field with a broken chunk is named"
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader
    images = {w:rng.normal(1000, 60, (1,80,96)).astype(np.uint16) for w in ('A/1','A/2','B/1')}
    for w,img in images.items(): write_zarr_field(tmp_path/'in.zarr'/w/'0', img, {}, ['BF'], pixel_size=.5)
    write_zarr_plate(tmp_path/'in.zarr', {w.replace('/',''):['0'] for w in images})
    fields = zarr_fields(tmp_path/'in.zarr', dict(brightfield='BF'))
    chunk = next(p for p in (tmp_path/'in.zarr'/'A'/'2'/'0'/'s0'/'c').rglob('*') if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:50])
    seg,out = segmenter(),tmp_path/'out'
    with pytest.warns(UserWarning, match='A02_0.*could not be decoded'): got = run_plate(fields, seg, out, artefacts=False)
    assert got.problems.field.tolist()==['A02_0'] and got.fields.well.tolist()==['A01','A02','B01']
    for w in ('A/1','B/1'):
        nodes = list(Reader(parse_url(str(out/'in.zarr'/w/'0')))())
        assert np.array_equal(np.asarray(nodes[0].data[0]), images[w])
        labels = {n.zarr.basename():np.asarray(n.data[0]) for n in nodes[1:] if n.data}
        assert np.array_equal(labels['classes'], seg.predict(images[w][0]).label) and labels['cells'].max()==len(got.cells().query(f"well=='{w.replace('/','0')}'"))
    whole = np.asarray(next(n for n in Reader(parse_url(str(out/'in.zarr')))() if n.data).data[0])
    assert whole.shape==(1,160,192) and np.array_equal(whole[0,:80,:96], images['A/1'][0]) and not whole[0,:80,96:].any()

def test_pixel_size_that_differs_is_noted(tmp_path, rng):
    fields = bright(tmp_path, 2, rng)
    write_image(fields.brightfield[1], rng.normal(1000, 50, (90,110)).astype(np.uint16), pixel_size=.8)
    got = run_plate(fields, segmenter(), tmp_path/'out', artefacts=False)
    assert got.fields.note[0] is None and '0.8' in got.fields.note[1] and 'rescale' in got.fields.note[1]
    with pytest.raises(FieldsError, match="no column 'brightfield'"): run_plate(fields.drop(columns='brightfield'), segmenter(), tmp_path/'o2')

def test_a_cluster_of_threads_is_refused(tmp_path, rng):
    from distributed import Client
    with Client(processes=False, dashboard_address=None) as client:
        with pytest.raises(CellsegError, match='threads of this process'): measure_fields(plate(tmp_path, 2, rng), tmp_path/'out', client=client)
