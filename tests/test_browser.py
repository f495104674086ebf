"""The explorers in JupyterLab, in a real browser: sliders moved, options chosen, pictures answering.
Screenshots are kept in the folder named by CELLSEG_SCREENSHOTS, or else in a temporary one; times are printed (`pytest -s`), not tested."""
import os
import nbformat, numpy as np, pandas as pd, pytest
from lab import Lab, drag, lab, missing, move_slider, picture, run_cell, save, screenshot, slider, value, wait_new_picture, wait_text, wait_until, wait_value

FIELD = '<img src=x onerror="window.hacked=1"> $\\alpha$'
CLASS = '<b onmouseover="window.hacked=1">nucleus</b>'
SETUP = '''
from cellseg.explorers import *
from cellseg.simulate import simulate_field, simulate_fields
import warnings; warnings.simplefilter('ignore')
f = simulate_field((1440,1920), seed=5, confluence=.5)'''

TRAIN = '''
from cellseg.data import patch_dls
from cellseg.learner import seg_learner
dls = patch_dls(simulate_fields('train', 3, (200,260), seed=1, confluence=.6).assign(fold=[0,1,2]), size=64, bs=4, n_train=24)
learn,m = seg_learner(dls, path='run', seed=1),TrainingMonitor()
with learn.no_bar(): learn.fit_fast(3, cbs=[m])'''

def test_harness():
    "A failed cell, a request to another host, and processes left behind do not go unnoticed"
    if why := missing(): pytest.skip(why)
    with Lab() as l:
        with pytest.raises(AssertionError, match='no such luck'): l.run_notebook(['print(6*7)','raise ValueError("no such luck")'], name='luck.ipynb')
        page = l.run_notebook(['print(6*7)'])
        assert wait_text(page, '42').inner_text().strip()=='42'
        with pytest.raises(AssertionError, match='ZeroDivisionError'): run_cell(page, '1/0')
        with pytest.raises(Exception, match='took longer than 1 s'): run_cell(page, 'import time; time.sleep(3)', timeout=1)
        with pytest.raises(AssertionError, match='42, not 43'): wait_value(page, '6*7', 43, timeout=3)
        page.evaluate("fetch('http://elsewhere.invalid/a.js').catch(() => 0)")
        with pytest.raises(AssertionError, match='elsewhere.invalid'): l.check()
        l.foreign.clear()
        names = [p.name() for p in l.processes()]
        assert any('chrom' in n for n in names) and any('python' in n for n in names)
    assert not l.processes() and not l.tmp.exists()

@pytest.fixture(scope='module')
def page(lab):
    cells = [SETUP, f'w = SamplerExplorer([f.label,f.label[:700]], [{FIELD!r},"other"], classes=("background","cytoplasm",{CLASS!r})); w',
        'a = AugmentationExplorer(f.brightfield, f.label); a', 't = ThresholdExplorer(f.nuclei, f.cytoplasm); t', TRAIN, 'print("trained")']
    return lab.run_notebook(cells)

@pytest.fixture
def shown(page, record_property):
    "Number of a picture in the page → function that does something and waits for the new picture; its time is printed"
    def wait(nth, name, do):
        s = wait_new_picture(page, do, nth)
        record_property(name, s); print(f'{name}: {1000*s:.0f} ms from the hand to the new picture')
    return wait

def test_sampler(page, shown):
    picture(page, 0).scroll_into_view_if_needed()
    shown(0, 'weight by keyboard', lambda: move_slider(page, CLASS, 1))
    shown(0, 'weight by keyboard, 9 steps', lambda: move_slider(page, CLASS, 9))
    wait_value(page, '[w.weights, w.state["weights"]]', [[1,1,2],[.25,.25,.5]])
    assert abs(value(page, 'w.state["shares"].centres.iloc[2]')-.5)<.06
    screenshot(page, 'sampler')
    handle = slider(page, CLASS)
    shown(0, 'weight by mouse', lambda: drag(page, handle, (.5,.5), (40,0)))
    moved = float(handle.get_attribute('aria-valuenow'))
    assert moved>2.5
    wait_value(page, 'round(w.weights[2], 1)', moved)
    shown(0, 'other field', lambda: page.get_by_label('field').select_option('other'))
    wait_value(page, '[w.field, w.state["field"]]', [1,1])

def test_names_are_no_markup(page):
    options = page.get_by_label('field').locator('option').all_inner_texts()
    assert [o.replace('\xa0', ' ') for o in options]==[FIELD,'other'] # ipywidgets keeps blanks from merging
    assert page.locator('.widget-label', has_text=CLASS).count()==1
    page.locator('.widget-label', has_text=CLASS).hover()
    assert page.evaluate('() => window.hacked') is None
    assert page.locator('.jp-OutputArea img[src="x"]').count()==0

def test_what_cant_be_shown_is_said(page):
    run_cell(page, 'w.weights = (.1,0,0)')
    old = picture(page, 0).get_attribute('src')
    move_slider(page, 'background', -1)
    said = page.get_by_text('there is nothing to draw: no class with a weight has a pixel')
    said.wait_for()
    assert picture(page, 0).get_attribute('src')==old
    screenshot(page, 'sampler_message')
    move_slider(page, 'background', 10)
    said.wait_for(state='detached')

def test_augmentation(page, shown):
    picture(page, 1).scroll_into_view_if_needed()
    shown(1, 'deviation by keyboard', lambda: move_slider(page, 'deviation, px', 1))
    shown(1, 'deviation by keyboard, 20 steps', lambda: move_slider(page, 'deviation, px', 20))
    shown(1, 'mesh by keyboard', lambda: move_slider(page, 'mesh', 2))
    wait_value(page, '[a.sigma, a.mesh, a.state["sigma"], a.state["mesh"]]', [25.5,4,25.5,4])
    screenshot(page, 'augmentation')
    shown(1, 'grid', lambda: page.get_by_label('grid').click())
    wait_value(page, 'a.grid', False)
    screenshot(page, 'augmentation_without_grid')

def test_threshold(page, shown):
    picture(page, 2).scroll_into_view_if_needed()
    screenshot(page, 'threshold')
    auto = value(page, 't.state["share"]["background"]')
    shown(2, 'threshold by keyboard', lambda: move_slider(page, 'whole-cell stain', 1))
    shown(2, 'threshold by keyboard, 50 steps', lambda: move_slider(page, 'whole-cell stain', 50))
    to = float(slider(page, 'whole-cell stain').get_attribute('aria-valuenow')) # to one decimal
    wait_value(page, f't.state["fit"].scales[1].level==t.cytoplasm and abs(t.cytoplasm-{to})<.06', True)
    assert page.get_by_label('method').input_value()=='by hand'
    assert value(page, 't.state["share"]["background"]')>auto
    screenshot(page, 'threshold_by_hand')
    shown(2, 'other method', lambda: page.get_by_label('method').select_option('gmm'))
    wait_value(page, 't.state["share"]["background"]', auto)

def test_monitor(page, shown):
    wait_text(page, 'trained')
    picture(page, 3).scroll_into_view_if_needed()
    wait_value(page, 'm.state["epoch"]', 3)
    screenshot(page, 'monitor')
    shown(3, 'an earlier epoch', lambda: move_slider(page, 'epoch', -2))
    wait_value(page, 'm.state["epoch"]', 1)

def test_without_the_kernel_that_made_it(lab, page):
    "A saved notebook shows its pictures: by the state of its widgets if that is saved, else by the picture beside each widget"
    nb = nbformat.read(save(page), 4)
    nbformat.write(nb, lab.folder/'state.ipynb')
    for c in nb.cells:
        for o in c.outputs:
            if (data := o.get('data')) and data.pop('application/vnd.jupyter.widget-view+json', None): assert 'image/jpeg' in data
    nb.metadata.pop('widgets')
    nbformat.write(nb, lab.folder/'pictures.ipynb')
    for name,pictures in (('state.ipynb','img.widget-image'),('pictures.ipynb','.jp-RenderedImage img')):
        again = lab.open(name)
        found = again.locator(pictures)
        found.nth(3).scroll_into_view_if_needed()
        wait_until(again, "s => { const p = [...document.querySelectorAll(s)]; return p.length==4 && p.every(i => i.complete && i.naturalWidth>500) }", pictures)
        assert again.get_by_text('Error displaying widget').count()==0
        screenshot(again, 'without_kernel_'+name.split('.')[0])

def _keep(w, name):
    "Keep an explorer's picture with the screenshots"
    if folder := os.environ.get('CELLSEG_SCREENSHOTS'): open(os.path.join(folder, f'{name}.png'), 'wb').write(w.picture('png'))

def test_real_images(data):
    "The explorers on real stains: what is shown is what the library says of the image in full"
    from cellseg.explorers import AugmentationExplorer, SamplerExplorer, ThresholdExplorer
    from cellseg.io import read_image
    brightfield,cells,nuclei = [read_image(next((data/'cellpainting_bf').rglob(f'*-ch{k}sk1fk1fl1.tiff'))) for k in (1,3,5)]
    t = ThresholdExplorer(nuclei, cells, pixel_size=.6)
    label = t.label()
    full = np.bincount(label.ravel(), minlength=3)/label.size
    assert np.abs(full-list(t.state['share'].values())).max()<.03
    assert (full>.01).all()
    _keep(t, 'real_threshold')
    t.nuclei += .5
    assert (t.label()==2).mean()<full[2]
    _keep(t, 'real_threshold_by_hand')
    w = SamplerExplorer([label], ['r03c03f03'])
    assert np.abs(w.state['shares'].centres-1/3).max()<.05
    _keep(w, 'real_sampler')
    _keep(AugmentationExplorer(brightfield, label, sigma=20), 'real_augmentation')

def test_table_of_real_fields(data):
    "A fields table whose labels have two classes"
    from cellseg.explorers import SamplerExplorer
    masks = sorted((data/'brifiseg').rglob('*_nuclei.tif'))
    w = SamplerExplorer(pd.DataFrame(dict(field=[p.name for p in masks], label=[str(p) for p in masks])), classes=('background','nucleus'))
    assert [n for n,_ in w.controls['field'].options]==[p.name for p in masks]
    w.weights = (1,3)
    assert abs(w.state['shares'].centres['nucleus']-.75)<.05
    w.field = len(masks)-1
    _keep(w, 'real_two_classes')
