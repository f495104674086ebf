"FieldComparer in JupyterLab: keys, mouse and sliders, what then stands on the page, and how long it takes"
import time
from pathlib import Path
import numpy as np, pytest
from lab import *
from lab import lab
from conftest import DATA

CELLS = '''
import tempfile, warnings; warnings.simplefilter('ignore')
from pathlib import Path
import numpy as np, pandas as pd
from cellseg.simulate import simulate_fields
from cellseg.data import read_label
from cellseg.io import read_grey, write_image
from cellseg.widgets import FieldComparer
tmp = Path(tempfile.mkdtemp())
fields = simulate_fields(tmp/'plate', 5, (1080,1200), seed=2, confluence=.5)
labels = [read_label(p).copy() for p in fields.label]
labels[1][:700] = 0; labels[3][:300] = 0; labels[0][500:600,500:600] = 2
write_image(tmp/'small.tif', labels[4][:540])
(tmp/'cut.tif').write_bytes(Path(fields.nuclei[2]).read_bytes()[:999])
fields.loc[2,'nuclei'] = str(tmp/'cut.tif'); fields.loc[3,'cytoplasm'] = None
fields.loc[4,'field'] = '<img src=x onerror="window.bad=1">'
fields = pd.concat([fields, pd.DataFrame([dict(field='empty')])], ignore_index=True)
preds = dict(zip(fields.field, [*labels[:4],str(tmp/'small.tif')]))
probs = {f:(np.eye(3)[l].transpose(2,0,1)*255).astype(np.uint8) for f,l in zip(fields.field, labels)}
w = FieldComparer(fields, preds, probs=probs, save_to=tmp/'judged.csv', height=560)
'''

ROOT = "document.querySelector('.cfc')"
def shows(page, **want):
    "Wait until the widget tells these of itself"
    wait_until(page, f"want => {{ const d = {ROOT}?.dataset; return d && Object.entries(want).every(([k,v]) => d[k]===v) }}", {k:str(v) for k,v in want.items()})
def data(page): return page.evaluate(f"() => ({{...{ROOT}.dataset}})")
def kernel(page, code): return run_cell(page, f'print({code})').strip()
def eventually(page, code, want):
    "Wait until the kernel says so"
    end = time.monotonic()+WAIT
    while (got := kernel(page, code))!=want and time.monotonic()<end: time.sleep(.05)
    assert got==want, (code,got,want)
def drawn(page):
    "Wait until what the widget knows is drawn: it draws with the browser's next frame"
    page.evaluate('() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))')
def box(page, panel=0):
    "Left upper corner and size of a panel, on the canvas"
    pw,ph,cols = map(float, data(page)['panel'].split())
    return (panel%cols)*(pw+3),(panel//cols)*(ph+3),pw,ph
def pixels(page, points):
    "Colours on the canvas at points (x,y)"
    return np.array(page.evaluate(f"ps => {{ const c = {ROOT}.querySelector('canvas'), x = c.getContext('2d'); return ps.map(([a,b]) => [...x.getImageData(Math.floor(a), Math.floor(b), 1, 1).data].slice(0,3)) }}", points))
def on_screen(page, row, col, panel=0):
    "Where the middle of an image pixel stands on the canvas"
    v,(x,y,w,h) = eval(kernel(page, 'dict(w.view)')),box(page, panel)
    z = float(data(page)['zoom'])
    r0,c0 = (v['row'],v['col']) if v['zoom'] else (540,600)
    return x+w/2+(col+.5-c0)*z,y+h/2+(row+.5-r0)*z
def stage(page): return page.locator('.cfc-stage')
def click_at(page, row, col, panel=0):
    x,y = on_screen(page, row, col, panel)
    stage(page).click(position=dict(x=x, y=y))
def reset(page):
    run_cell(page, "w.set_trait('view', dict(row=0,col=0,zoom=0)); w.mode,w.outline,w.opacity,w.field,w.order,w.contrast,w.panels,w.shown,w.stains = 'panels',False,.5,0,'table',{},w.config['panels'],w.config['classes'],w.config['stains']")
    stage(page).focus(); shows(page, field=0, ready=1)

@pytest.fixture(scope='module')
def widget(lab):
    page = lab.run_notebook([CELLS,'w'], 'comparer.ipynb')
    page.evaluate(f"() => {ROOT}.scrollIntoView()")
    shows(page, field=0, ready=1)
    return page

@pytest.fixture
def page(widget):
    reset(widget)
    yield widget
    widget.lab.check()
    assert not widget.messages, 'the page reported errors'

def test_it_opens_scores_and_lists_the_worst_first(page):
    wait_until(page, f"() => !{ROOT}.querySelector('.cfc-dice').textContent.includes('so far')", timeout=60)
    assert data(page)['shows']=='bright-field|fluorescence|truth|prediction|difference'
    page.locator('.cfc select[title^=Order]').select_option('worst')
    first = page.locator('.cfc-picker option').first.inner_text()
    assert 'sim0001' in first and first.startswith(kernel(page, "f'{np.mean(w.dice[\"prediction\"][\"1\"]):.3f}'"))
    assert 'onerror' in page.locator('.cfc-picker option').nth(4).inner_text() # what can't be scored stands last
    said = page.locator('.cfc-dice').inner_text()
    for c,d in zip(('background','cytoplasm','nucleus'), eval(kernel(page, "w.dice['prediction']['0']"))): assert f'{c} {d:.3f}' in said
    page.locator('.cfc select[title^=Order]').select_option('nucleus'); eventually(page, 'w.order', 'nucleus')
    screenshot(page, 'comparer-opened', page.locator('.cfc'))

def test_keys_go_from_field_to_field_and_do_nothing_to_the_notebook(page):
    cells = page.locator('.jp-Cell').count()
    press(page, 'ArrowRight'); shows(page, field=1, ready=1); press(page, 'n'); shows(page, field=2, ready=1); press(page, 'ArrowLeft'); shows(page, field=1, ready=1)
    eventually(page, 'w.field', '1')
    run_cell(page, "w.order='worst'")
    eventually(page, 'w.scored', 'True')
    press(page, 'ArrowRight'); shows(page, field=3) # the second worst
    for k in ('b','a','x','p'): # in the notebook these would add cells and cut them
        press(page, k); time.sleep(.1)
        assert page.locator('.jp-Cell').count()==cells, k

def test_deep_zoom_is_sharp_and_in_the_right_place(page):
    "At full resolution each label pixel has its class's colour, in the same place in truth and prediction"
    run_cell(page, 'w.opacity = 1')
    press(page, 'o'); eventually(page, 'w.outline', 'True'); press(page, 'o')
    row,col = eval(kernel(page, "np.argwhere(labels[0]==2)[9000].tolist()")) # in a nucleus
    run_cell(page, f'w.view = dict(row={row}, col={col}, zoom=1.2)'); shows(page, detail=1, zoom=1.2)
    x,y,w,h = box(page, 2)
    for _ in range(3): wheel(page, stage(page), (x+.6*w, y+.4*h), -300)
    wait_until(page, f"() => Number({ROOT}.dataset.zoom)>4")
    shows(page, detail=1)
    z = float(data(page)['zoom']); assert z>4
    eventually(page, f"w.view['zoom']=={z}", 'True')
    v = eval(kernel(page, 'w.view'))
    rng = np.random.default_rng(0)
    at = [(int(v['row']+dr),int(v['col']+dc)) for dr,dc in zip(rng.integers(-h/z/2+6, h/z/2-6, 60), rng.integers(-w/z/2+2, w/z/2-12, 60))]
    for panel,img in ((2,'read_label(fields.label[0])'),(3,'labels[0]')):
        want = eval(kernel(page, f"[{img}[r,c].item() for r,c in {at}]"))
        got = pixels(page, [on_screen(page, r, c, panel) for r,c in at])
        for k,colour in ((1,'#56B4E9'),(2,'#E69F00')):
            hit = (got==[int(colour[i:i+2],16) for i in (1,3,5)]).all(1)
            assert (hit==(np.array(want)==k)).all(), (panel,k)
        assert len(set(want))>1
    screenshot(page, 'comparer-deep')
    press(page, '0'); eventually(page, "w.view['zoom']", '0')

def test_panels_move_together_by_drag(page):
    x,y,w,h = box(page, 0)
    for _ in range(4): wheel(page, stage(page), (x+w/2, y+h/2), -300)
    time.sleep(.4); v = eval(kernel(page, 'w.view'))
    drag(page, stage(page), (x+w/2, y+h/2), (x+w/2-60, y+h/2+24)); time.sleep(.4)
    u,z = eval(kernel(page, 'w.view')),float(data(page)['zoom'])
    assert abs(u['col']-v['col']-60/z)<1 and abs(u['row']-v['row']+24/z)<1
    shows(page, detail=1)
    a = pixels(page, [(box(page, 0)[0]+30+i, 100) for i in range(80)]); b = pixels(page, [(box(page, 4)[0]+30+i, box(page, 4)[1]+100) for i in range(80)])
    assert (a==b).all(1).mean()>.9 # bright-field, and below the differences, of which there are none here

def test_a_picture_of_reduced_size_is_replaced_by_full_resolution(page):
    run_cell(page, 'w.view = dict(row=300, col=300, zoom=1.5)')
    shows(page, detail=1)
    want = eval(kernel(page, "[int(v) for v in read_grey(fields.brightfield[0])[300,280:320]]"))
    got = pixels(page, [on_screen(page, 300, c) for c in range(280,320)])[:,0]
    assert np.corrcoef(want, got)[0,1]>.9

def test_opacity_contrast_classes_and_outline_need_no_python(page):
    run_cell(page, 'w.panels = ["bright-field","truth"]'); shows(page, shows='bright-field|truth')
    x,y,w,h = box(page, 1)
    ps = [(x+a*w/20, y+b*h/20) for a in range(1,20) for b in range(2,20)]
    page.evaluate("() => { window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code:'import time; time.sleep(6)', store_history:false}) }") # the kernel can't answer
    start = time.monotonic()
    before = pixels(page, ps)
    s = page.locator('.cfc input[title^=Opacity]'); s.focus(); press(page, *['ArrowRight']*8)
    time.sleep(.1)
    more = pixels(page, ps); assert (more!=before).any(1).sum()>20
    page.locator('.cfc label:has-text("cytoplasm") input:not([title])').click(); time.sleep(.1)
    fewer = pixels(page, ps); assert (fewer!=more).any(1).sum()>20
    page.locator('.cfc input[title^=Outlines]').click(); time.sleep(.1)
    line = pixels(page, ps); assert (line!=fewer).any()
    grey = pixels(page, [(30+i, 60) for i in range(100)])
    s = page.locator('.cfc input[data-channel=brightfield][data-end=high]'); s.focus(); press(page, *['ArrowLeft']*60); time.sleep(.1)
    brighter = pixels(page, [(30+i, 60) for i in range(100)])
    assert brighter.mean()>grey.mean()+10 and time.monotonic()-start<6
    eventually(page, "(w.outline, w.shown, w.opacity)", "(True, ['background', 'nucleus'], 0.9)")
    low,high = eval(kernel(page, "w.contrast['brightfield']")); assert high<float(kernel(page, "np.percentile(read_grey(fields.brightfield[0]), 99)"))
    screenshot(page, 'comparer-outlines')
    page.locator('.cfc button[title^="Contrast of brightfield"]').click(); eventually(page, 'w.contrast', '{}')

def test_a_stain_can_be_switched_off(page):
    x,y,w,h = box(page, 1)
    ps = [(x+a*w/30, y+b*h/30) for a in range(5,25) for b in range(3,28)]
    page.locator('.cfc input[title="Show nuclei?"]').click(); eventually(page, 'w.stains', "['cytoplasm']")
    drawn(page)
    only = pixels(page, ps).astype(int)
    assert (only[:,2]>=only[:,0]).all() and only.max()>50 # blue, no orange
    page.locator('.cfc input[title="Show cytoplasm?"]').click(); eventually(page, 'w.stains', '[]')
    drawn(page)
    assert pixels(page, ps).max()<40

def test_curtain_and_blink(page):
    run_cell(page, "w.pair = ['bright-field','truth']; w.opacity = 1")
    stage(page).focus(); press(page, 'm'); eventually(page, 'w.mode', 'curtain')
    shows(page, shows='bright-field|truth')
    x,y,w,h = box(page)
    colours = lambda: (np.ptp(pixels(page, [(a, b) for a in range(10, int(w)-10, 12) for b in range(20, int(h), 12)]).astype(int), axis=1)>20).reshape(-1, len(range(20, int(h), 12))).any(1)
    mid = len(colours())//2
    c = colours(); assert not c[:mid-1].any() and c[mid+1:].any() # colours of the truth only to the right
    drag(page, stage(page), (w/2, h/2), (.9*w, h/2)); eventually(page, "round(w.curtain,1)", '0.9')
    assert not colours()[:int(1.7*mid)].any()
    screenshot(page, 'comparer-curtain')
    press(page, 'm'); eventually(page, 'w.mode', 'blink')
    shows(page, shows='truth'); shows(page, shows='bright-field'); shows(page, shows='truth') # by itself
    press(page, ' '); time.sleep(.3); here = data(page)['shows']
    time.sleep(1); assert data(page)['shows']==here # the key stopped the clock
    press(page, ' '); wait_until(page, f"a => {ROOT}.dataset.shows!==a", here)

def test_click_tells_what_lies_there(page):
    row,col = eval(kernel(page, "np.argwhere(labels[0]==2)[4000].tolist()"))
    run_cell(page, f'w.view = dict(row={row}, col={col}, zoom=8)'); shows(page, detail=1)
    click_at(page, row, col, 3)
    wait_until(page, f"() => {ROOT}.querySelector('.cfc-readout').textContent.includes('probability')")
    said = page.locator('.cfc-readout').inner_text()
    assert f'{row}, {col}' in said and 'nucleus 1.00' in said and kernel(page, f"read_grey(fields.nuclei[0])[{row},{col}]") in said
    number = kernel(page, "w.place['cell']['prediction']")
    assert int(number)>0 and f'cell {number}, nucleus' in said
    row,col = eval(kernel(page, f"next(o for o in np.argwhere((w.layers.cells(0, 'prediction')[1]=={number})&(labels[0]==1)).tolist() if max(abs(o[0]-{row}),abs(o[1]-{col}))<30)")) # beside its nucleus
    click_at(page, row, col, 3)
    wait_until(page, f"said => {ROOT}.querySelector('.cfc-readout').textContent.includes(said)", f'cell {number}, cytoplasm')
    eventually(page, "(w.place['cell']['prediction'], w.place['nucleus']['prediction'])", f'({number}, False)')
    screenshot(page, 'comparer-click', page.locator('.cfc'))

def test_verdicts_and_notes_are_saved_as_text(page):
    press(page, 'x'); eventually(page, 'w.fields.verdict[0]', 'exclude')
    note = page.locator('.cfc-note'); note.fill('<b onmouseover=alert(1)>odd</b>'); press(page, 'Enter')
    eventually(page, 'w.fields.note[0]', '<b onmouseover=alert(1)>odd</b>')
    note.fill('half written'); run_cell(page, 'w.field = 1'); shows(page, field=1)
    eventually(page, 'w.fields.note[:2].tolist()', "['half written', None]") # under the field it was written for
    assert page.locator('.cfc-note').input_value()==''
    stage(page).focus(); press(page, 'a'); eventually(page, "pd.read_csv(tmp/'judged.csv').verdict.tolist()[:2]", "['exclude', 'accept']")
    press(page, 'a'); eventually(page, 'w.fields.verdict[1]', 'None')
    assert page.locator('.cfc-picker option').first.inner_text().endswith('✗ ✎') or '✗' in page.locator('.cfc-picker option').first.inner_text()

def test_names_and_notes_are_never_markup(page):
    run_cell(page, "w.judge(note='<img src=x onerror=\"window.bad=2\">', field=4); w.field = 4"); shows(page, field=4, ready=1)
    assert '<img src=x onerror="window.bad=1">' in page.locator('.cfc-picker option:checked').inner_text()
    assert page.locator('.cfc-note').input_value().startswith('<img')
    assert page.locator('.cfc img').count()==0 and page.evaluate('() => window.bad') is None

def test_missing_broken_and_odd_files_tell_it_in_their_panel(page):
    run_cell(page, 'w.field = 2'); shows(page, field=2, ready=1)
    assert 'cut.tif could not be decoded' in page.locator('.cfc-message').inner_text()
    screenshot(page, 'comparer-broken')
    run_cell(page, 'w.field = 3'); shows(page, field=3, ready=1)
    assert page.locator('.cfc-message').inner_text()=='this field has no cytoplasm image'
    run_cell(page, 'w.field = 4'); shows(page, field=4, ready=1)
    said = page.locator('.cfc-message').all_inner_texts()
    assert len(said)==2 and all('(540, 1200) and brightfield (1080, 1200)' in s for s in said) # prediction and difference
    assert pixels(page, [(100,100)]).mean()>40 # the bright-field is there
    run_cell(page, 'w.field = 5'); shows(page, field=5, ready=1)
    assert page.locator('.cfc-message').first.inner_text()=='this field has no brightfield image'
    press(page, '0', '+', 'ArrowLeft'); shows(page, field=4, ready=1) # keys work where nothing can be shown

def test_driven_by_code(page):
    run_cell(page, "w.panels = ['truth']; w.field = 'sim0001'"); shows(page, field=1, shows='truth', ready=1)
    run_cell(page, "w.base = 'nothing'; w.opacity = 1"); time.sleep(.3)
    x,y,w,h = box(page)
    seen = {tuple(p) for p in pixels(page, [(x+a*w/40, y+b*h/40) for a in range(4,36) for b in range(4,40)]).tolist()}
    assert {(86,180,233),(230,159,0)} < seen
    run_cell(page, "w.base = 'bright-field'")

def test_times(page, record_property):
    "How long it takes until the picture stands; reported, not judged"
    t = {}
    for k,f in (('next field, fetched before',1),('next field',2),('next field, too',3)):
        time.sleep(1.5 if f==1 else 0)
        start = time.perf_counter(); press(page, 'ArrowRight'); shows(page, field=f, ready=1); t[k] = time.perf_counter()-start
    move = f"""async ([css, v]) => {{ const s = {ROOT}.querySelector(css), d = {ROOT}.dataset, old = d.draws, t = performance.now(); s.value = Number(s.min)+v*(s.max-s.min); s.dispatchEvent(new Event('input'))
        while (d.draws===old) await new Promise(r => requestAnimationFrame(r)); return (performance.now()-t)/1000 }}"""
    for k,css in (('opacity','input[title^=Opacity]'),('contrast','input[data-channel=brightfield][data-end=high]')): t[k] = max(page.evaluate(move, [css,v]) for v in (.3,.6,.9))
    for k,v in t.items(): record_property(k, f'{v:.3f} s'); print(f'{k}: {v*1000:.0f} ms')
    assert all(v<20 for v in t.values())

def test_a_saved_notebook_shows_the_picture_without_its_kernel(lab, widget):
    "Live, the widget hides it; reopened, it stands there"
    assert widget.locator('.jp-OutputArea-child img').first.is_hidden()
    widget.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    other = lab.folder/'later.ipynb'
    other.write_bytes((lab.folder/'comparer.ipynb').read_bytes())
    page = lab.open('later.ipynb')
    img = page.locator('.jp-OutputArea-child img').first
    img.wait_for(state='visible')
    wait_until(page, "() => document.querySelector('.cfc-silent')?.textContent.includes('run this cell again')") # JupyterLab has kept the widget, without its kernel
    assert img.evaluate('e => e.naturalWidth')>500 and img.is_visible() and page.locator('.cfc').is_hidden()
    screenshot(page, 'comparer-without-kernel')
    page.context.close()

@pytest.mark.skipif(not DATA.is_dir(), reason='no real images beside the repository')
def test_real_fields(lab):
    page = lab.run_notebook([f'''
import warnings; warnings.simplefilter('ignore')
from pathlib import Path
import numpy as np, pandas as pd
from cellseg.widgets import FieldComparer
from cellseg.labels import fluorescence_labels
from cellseg.io import read_grey
d = Path({str(DATA)!r})
paint = {{c:str(next((d/'cellpainting_bf').glob(f'*-{{k}}sk*'))) for c,k in (('brightfield','ch1'),('cytoplasm','ch3'),('nuclei','ch5'))}}
lbl = fluorescence_labels(read_grey(paint['nuclei']), read_grey(paint['cytoplasm']))
w = FieldComparer(pd.DataFrame([dict(field='paint', **paint)]), [lbl]); w''','''
b = pd.DataFrame([dict(field=p.name[:8], brightfield=str(p), label=str(p).replace('_BF','_nuclei')) for p in sorted((d/'brifiseg').glob('*_BF.tif'))])
v = FieldComparer(b, [np.roll(read_grey(p), 6, 1).astype(np.uint8) for p in b.label], classes=('background','nucleus'), height=700); v'''])
    wait_until(page, "() => [...document.querySelectorAll('.cfc')].filter(e => e.dataset.ready==='1').length===2")
    for i,name in enumerate(('cellpainting','brifiseg')):
        root = page.locator('.cfc').nth(i); root.scroll_into_view_if_needed()
        s = root.locator('.cfc-stage'); s.focus(); screenshot(page, f'comparer-{name}', root)
        run_cell(page, ["r,c = np.argwhere(lbl==2)[9000]; w.view = dict(row=int(r), col=int(c), zoom=3)","r,c = np.argwhere(read_grey(v.fields.label[v.field])==1)[4000]; v.view = dict(row=int(r), col=int(c), zoom=5)"][i])
        page.wait_for_timeout(700); screenshot(page, f'comparer-{name}-zoomed', root)
        assert root.locator('.cfc-message').count()==0
    assert float(page.locator('.cfc').nth(1).get_attribute('data-zoom'))==5
    page.context.close()
