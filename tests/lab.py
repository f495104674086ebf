"""JupyterLab in a real browser, for tests of widgets.

    from lab import lab, wait_text, move_slider          # pytest finds the fixture `lab` by this import

    def test_it(lab):
        page = lab.run_notebook(['import cellseg', 'print("done")'])   # a Playwright page: JupyterLab, all cells run
        wait_text(page, 'done')

The server, its kernels and the browser belong to one test file: they start with its first test and are gone after its last. Nothing may be
asked of another host than this one: every step fails if the page did. All waits end."""
import json,os,re,shutil,subprocess,sys,tempfile,time,uuid
from pathlib import Path
from urllib.parse import urlsplit
import nbformat, psutil, pytest

WAIT = 60      # seconds that a step may take
RUN = 240      # seconds that the cells of a notebook may take
_settings = { # no news, no look for a newer JupyterLab; outputs exist also where they are not in view; nothing pops up; saved notebooks hold their widgets
    '@jupyterlab/apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
    '@jupyterlab/notebook-extension/tracker': dict(windowingMode='none'),
    '@jupyterlab/completer-extension/manager': dict(autoCompletion=False),
    '@jupyter-widgets/jupyterlab-manager/plugin': dict(saveState=True)}

def chromium():
    "Path of the system's Chromium, or None"
    return next((p for n in ('chromium','chromium-browser','google-chrome') if (p := shutil.which(n))), None)

def missing():
    "Why there can be no browser test here, or None"
    if not chromium(): return 'Chromium is not installed (`apt-get install chromium`)'
    for m in ('jupyterlab','playwright','ipywidgets'):
        try: __import__(m)
        except ImportError: return f'the Python package {m} is not installed'

class Lab:
    "JupyterLab and a headless browser; a context manager"
    def __init__(self, size=(1280,1100)):
        self.size,self.foreign,self.started,self.before = size,[],set(),set()

    def __enter__(self):
        self.tmp,self.before = Path(tempfile.mkdtemp(prefix='cellseg-lab-')),set(psutil.Process().children(recursive=True))
        try: self._start_server(); self._start_browser()
        except BaseException: self.__exit__(); raise
        return self

    def _start_server(self):
        self.folder = self.tmp/'work'
        for d in ('work','config','data','runtime','ipython','workspaces'): (self.tmp/d).mkdir()
        for name,value in _settings.items():
            p = self.tmp/'settings'/f'{name}.jupyterlab-settings'
            p.parent.mkdir(parents=True, exist_ok=True); p.write_text(json.dumps(value))
        self.token = uuid.uuid4().hex
        env = {k:v for k,v in os.environ.items() if not k.startswith(('JUPYTER','JPY_','PYTEST_'))} | dict(JUPYTER_CONFIG_DIR=str(self.tmp/'config'),
            JUPYTER_DATA_DIR=str(self.tmp/'data'), JUPYTER_RUNTIME_DIR=str(self.tmp/'runtime'), IPYTHONDIR=str(self.tmp/'ipython'), JUPYTER_TOKEN=self.token,
            MPLBACKEND='module://matplotlib_inline.backend_inline')
        options = ['ServerApp.ip=127.0.0.1','ServerApp.port=0',f'ServerApp.root_dir={self.folder}','LabApp.news_url=None',
            'LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate','LabApp.extension_manager=readonly',
            f'LabApp.user_settings_dir={self.tmp/"settings"}',f'LabApp.workspaces_dir={self.tmp/"workspaces"}']
        root = ['--allow-root'] if hasattr(os,'geteuid') and os.geteuid()==0 else []
        with open(self.tmp/'server.log','wb') as log:
            self.server = subprocess.Popen([sys.executable,'-m','jupyterlab','--no-browser','--expose-app-in-browser',*root,*[f'--{o}' for o in options]],
                cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        info = self.tmp/'runtime'/f'jpserver-{self.server.pid}.json'
        self.url = _until(lambda: _read_url(info), self.server, 60, lambda: f'JupyterLab did not start:\n{self.log()}')

    def _start_browser(self):
        from playwright.sync_api import sync_playwright
        self.playwright = sync_playwright().start()
        self.browser = self.playwright.chromium.launch(executable_path=chromium(), timeout=60_000, # milliseconds
            args=['--no-sandbox','--disable-gpu','--disable-background-networking','--disable-component-update','--no-first-run'])

    def run_notebook(self,
        cells, # Code cells, as text
        name=None, # Of the notebook; None: a new one
        timeout=RUN, # Seconds that all cells may take
        errors=False, # May a cell fail?
    ): # Playwright page, with `.name`, the notebook's file, added
        "Open a notebook of these cells in a fresh browser window and run them all"
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells],
            metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
        path = self.folder/(name or f'{uuid.uuid4().hex[:8]}.ipynb')
        nbformat.write(nb, path)
        page = self.open(path.name)
        page.evaluate(_RUN, timeout*1000)
        self.check()
        if not errors and (bad := self.errors(page)): raise AssertionError('a cell failed:\n'+'\n'.join(bad))
        return page

    def open(self, name):
        "Open a notebook of the server's folder in a fresh browser window; its kernel is ready then"
        context = self.browser.new_context(viewport=dict(width=self.size[0], height=self.size[1]))
        context.set_default_timeout(WAIT*1000)
        context.on('request', lambda r: self._note(r.url))
        page = context.new_page()
        page.on('websocket', lambda w: self._note(w.url))
        page.on('console', lambda m: page.messages.append(m.text) if m.type=='error' else None)
        page.on('pageerror', lambda e: page.messages.append(str(e)))
        page.lab,page.name,page.messages = self,name,[]
        page.goto(f'{self.url}doc/tree/{name}?token={self.token}', timeout=60_000)
        page.wait_for_function('() => window.jupyterapp?.shell?.currentWidget?.sessionContext', timeout=60_000)
        page.evaluate(_READY, 60_000)
        self.check()
        return page

    def _note(self, url):
        u = urlsplit(url)
        if u.scheme in ('http','https','ws','wss') and u.hostname not in ('127.0.0.1','localhost'): self.foreign.append(url)

    def check(self):
        "Fail if a page asked another host for something"
        assert not self.foreign, f'the page asked other hosts: {self.foreign}'

    def errors(self, page):
        "Error messages in the notebook's outputs"
        return page.evaluate(_ERRORS)

    def log(self): return (self.tmp/'server.log').read_text(errors='replace')[-3000:]

    def processes(self):
        "Everything that was started: server, kernels, browser"
        self.started |= set(psutil.Process().children(recursive=True))-self.before
        return [p for p in self.started if _alive(p)]

    def __exit__(self, *exc):
        self.processes()
        for close in (getattr(self,'browser',None) and self.browser.close, getattr(self,'playwright',None) and self.playwright.stop):
            try: close and close()
            except Exception as e: print('closing the browser:', e)
        if hasattr(self,'server'):
            self.processes()
            self.server.terminate()
            try: self.server.wait(15)
            except subprocess.TimeoutExpired: pass
            for p in self.processes():
                try: p.kill()
                except psutil.Error: pass
            psutil.wait_procs(list(self.started), timeout=10)
            self.server.wait(10)
        shutil.rmtree(self.tmp, ignore_errors=True)
        if not exc or exc[0] is None: self.check()

def _alive(p):
    try: return p.is_running() and p.status()!=psutil.STATUS_ZOMBIE
    except psutil.Error: return False

def _read_url(info):
    try: return json.loads(info.read_text())['url']
    except (OSError,ValueError,KeyError): return None

def _until(f, process, seconds, message):
    "First true value of `f()`, or an error after some seconds or when the process ended"
    end = time.monotonic()+seconds
    while time.monotonic()<end and process.poll() is None:
        if v := f(): return v
        time.sleep(.05)
    raise RuntimeError(message())

_LIMIT = "const limit = (p, what) => Promise.race([p, new Promise((_, no) => setTimeout(() => no(new Error(what+' took longer than '+ms/1000+' s')), ms))]);"
_READY = "async ms => {"+_LIMIT+"""
    const p = window.jupyterapp.shell.currentWidget;
    await limit(p.context.ready, 'opening the notebook'); await limit(p.sessionContext.ready, 'starting the session');
    await limit(p.sessionContext.session.kernel.info, 'starting the kernel')}"""
_RUN = "async ms => {"+_LIMIT+"await limit(window.jupyterapp.commands.execute('notebook:run-all-cells'), 'running the notebook')}"
_ERRORS = """() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap(c => c.model.type=='code' ? c.model.outputs.toJSON() : [])
    .filter(o => o.output_type=='error').map(o => o.traceback.join('\\n').replace(/\\u001b\\[[0-9;]*m/g, ''))"""

# Steps on a page

def wait_text(page, text, timeout=WAIT):
    "Wait until an output of the notebook shows a text (or matches a compiled pattern); gives its locator"
    found = page.locator('.jp-OutputArea-output').filter(has_text=text).last
    found.wait_for(state='visible', timeout=timeout*1000)
    page.lab.check()
    return found

def wait_until(page, expression, arg=None, timeout=WAIT):
    "Wait until a JavaScript expression (or function of `arg`) is true"
    page.wait_for_function(expression, arg=arg, timeout=timeout*1000)
    page.lab.check()

def run_cell(page, code, timeout=WAIT):
    "Run more code in the notebook's kernel, as a user in a console would; gives what it prints"
    out = page.evaluate(_CODE, dict(code=code, ms=timeout*1000))
    page.lab.check()
    if out['error']: raise AssertionError(f"{code}\n{out['error']}")
    return out['text']
_CODE = "async ({code, ms}) => {"+_LIMIT+"""
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    let text = '', error = '';
    const f = kernel.requestExecute({code, store_history: false});
    f.onIOPub = m => { if (m.header.msg_type=='stream') text += m.content.text; if (m.header.msg_type=='error') error += m.content.traceback.join('\\n').replace(/\\u001b\\[[0-9;]*m/g, '') };
    await limit(f.done, 'running code'); return {text, error}}"""

def value(page, expression):
    "Value of a Python expression in the notebook's kernel, as JSON can tell it"
    return json.loads(run_cell(page, f'import json as _json; print(_json.dumps({expression}))'))

def wait_value(page, expression, want, timeout=WAIT):
    "Wait until a Python expression in the kernel has this value: what a hand did has arrived then"
    end = time.monotonic()+timeout
    while (got := value(page, expression))!=want:
        assert time.monotonic()<end, f'{expression} is {got}, not {want}'
        time.sleep(.02)

def save(page):
    "Save the notebook with its outputs; gives the file"
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    return page.lab.folder/page.name

def slider(page, label, nth=0):
    "Handle of the ipywidgets slider with this description"
    row = page.locator('.widget-slider').filter(has=page.locator('.widget-label', has_text=re.compile(rf'^\s*{re.escape(label)}\s*$')))
    return row.nth(nth).locator('.noUi-handle').first

def move_slider(page, label, steps, nth=0):
    "Move a slider by the keyboard: so many steps right, or left if negative; gives its value afterwards"
    handle = slider(page, label, nth)
    handle.focus()
    for _ in range(abs(steps)): handle.press('ArrowRight' if steps>0 else 'ArrowLeft')
    page.lab.check()
    return float(handle.get_attribute('aria-valuenow'))

def picture(page, nth=0, within='.jp-OutputArea-output'):
    "Locator of a picture (`ipywidgets.Image`) in the outputs"
    return page.locator(f'{within} img.widget-image').nth(nth)

def wait_new_picture(page, do, nth=0, timeout=WAIT):
    "Do something, wait for another picture; gives seconds until it was shown"
    img = picture(page, nth)
    img.wait_for(timeout=timeout*1000)
    old,handle,start = img.get_attribute('src'),img.element_handle(),time.perf_counter()
    do()
    wait_until(page, '([e, old]) => e.src!=old && e.complete && e.naturalWidth>0', [handle,old], timeout)
    return time.perf_counter()-start

def drag(page, target, start, end, steps=8, button='left'):
    "Drag with the mouse over an element (locator or selector); points are (x,y), pixels from its upper left corner, or shares of its size if all are below 1"
    box = _box(page, target)
    share = all(abs(v)<=1 for v in (*start,*end))
    at = lambda p: (box['x']+p[0]*(box['width'] if share else 1), box['y']+p[1]*(box['height'] if share else 1))
    page.mouse.move(*at(start)); page.mouse.down(button=button)
    page.mouse.move(*at(end), steps=steps); page.mouse.up(button=button)
    page.lab.check()

def wheel(page, target, at, dy):
    "Turn the mouse wheel at a point (x,y) of an element: dy<0 is away from you"
    box = _box(page, target)
    share = all(abs(v)<=1 for v in at)
    page.mouse.move(box['x']+at[0]*(box['width'] if share else 1), box['y']+at[1]*(box['height'] if share else 1))
    page.mouse.wheel(0, dy)
    page.lab.check()

def _box(page, target):
    loc = page.locator(target).first if isinstance(target, str) else target
    loc.scroll_into_view_if_needed()
    box = loc.bounding_box()
    assert box, f'{target} is not on the page'
    return box

def press(page, *keys):
    "Press keys, one after another ('ArrowRight', 'n', 'Control+z')"
    for k in keys: page.keyboard.press(k)
    page.lab.check()

def screenshot(page, name, of=None):
    "Save what the page (or an element) shows in the folder named by CELLSEG_SCREENSHOTS, or a temporary one; gives the file"
    folder = Path(os.environ.get('CELLSEG_SCREENSHOTS') or Path(tempfile.gettempdir())/'cellseg-screenshots')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder/f'{name}.png'
    (of or page).screenshot(path=path)
    page.lab.check()
    return path

@pytest.fixture(scope='module')
def lab():
    if why := missing(): pytest.skip(why)
    with Lab() as l: yield l

def keep_pictures(path):
    "Take out of a stored notebook what only a live kernel can show, where there is a picture beside it: JupyterLab would show an error instead of the picture"
    nb = nbformat.read(path, 4)
    for o in [o for c in nb.cells for o in c.get('outputs', []) if any(k.startswith('image/') for k in o.get('data', {}))]: o.data.pop('application/vnd.jupyter.widget-view+json', None)
    nb.metadata.pop('widgets', None)
    Path(path).write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n', encoding='utf-8')

if __name__=='__main__':
    for p in sys.argv[1:]: keep_pictures(p)
