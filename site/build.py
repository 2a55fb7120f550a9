"""Build the website in _docs from the notebooks, complete without a network: formulas are MathML, links between pages are relative, search works from files. `--github USER/REPOSITORY` adds links that open a page in Colab. Ends with 1 if a link leads nowhere."""
import argparse
import inspect
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from html import unescape
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
from latex2mathml.converter import convert
from nbdev.serve import proc_nbs
from nbdev.showdoc import show_doc

ROOT = Path(__file__).parents[1]
OUT = ROOT / "_docs"
SETTINGS = ConfigParser()
SETTINGS.read(ROOT / "settings.ini")
HOST = SETTINGS["DEFAULT"]["doc_host"] + SETTINGS["DEFAULT"]["doc_baseurl"] + "/"
FILES = f'{SETTINGS["DEFAULT"]["git_url"]}/blob/{SETTINGS["DEFAULT"]["branch"]}/'  # of the repository, which are no pages


def methods(thing):
    "Markdown of a class's own public methods and properties; nbdev shows its constructor"
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        f = getattr(member, "__func__", member)
        if name.startswith("_"):
            continue
        if inspect.isfunction(f) and f.__doc__:
            yield show_doc(f, title_level=4, name=f"{thing.__name__}.{name}")._repr_markdown_().split("\n\n", 2)[2]
        elif isinstance(member, property) and member.__doc__:
            yield f"`{thing.__name__}.{name}`: {member.__doc__}"


def document(path):
    "A notebook of the library, with the methods under each class that it exports"
    nb = nbformat.read(path, 4)
    place = path.relative_to(ROOT / "_proc" / "api").with_suffix("").parts
    module = import_module(".".join(("spml_kit", *place[:-1], re.sub(r"^\d+[a-z]?_", "", place[-1]))))
    for cell in nb.cells:
        shown = re.search(r"^show_doc\((\w+)\)$", cell.source, re.M)
        if shown and cell.outputs:
            cell.outputs[0].data["text/markdown"] += "".join(f"\n\n{m}" for m in methods(getattr(module, shown[1])))
    nbformat.write(nb, path)


def render():
    "Notebooks with the signatures of what they export, then pages"
    proc_nbs(force=True)
    for path in (ROOT / "_proc" / "api").rglob("*.ipynb"):
        document(path)
    done = subprocess.run([Path(sys.executable).parent / "smalldocs", "render", ROOT / "_proc"], stderr=subprocess.PIPE, text=True)
    sys.stderr.writelines(line for line in done.stderr.splitlines(True) if "output-file" not in line)  # nbdev's name of a page, which is not used
    done.check_returncode()


def finish(html, folder, pages):
    "A page without scripts for formulas, and with links to the page beside it where nbdev links to the published one"
    html = re.sub(r'(<span class="math (\w+)">)\\.(.*?)\\.(?=</span>)', lambda m: m[1] + convert(unescape(m[3]), display="inline" if m[2] == "inline" else "block"), html, flags=re.S)
    html = re.sub(r"<(?:link|script)[^>]*katex[^>]*>(?:</script>)?", "", html)
    html = re.sub(r'href="(?:\.\./)+(?=CONTRIBUTING|CITATION|LICENSE|benchmarks/)', f'href="{FILES}', html)
    return re.sub(re.escape(HOST) + r"((?:\w+/)+\w+)\.html", lambda m: "../" * len(folder.parts) + pages[m[1]], html)


def runnable(html, page, github):
    "A page that hands out its notebook"
    notebook = ROOT / "nbs" / page.with_suffix(".ipynb")
    if not notebook.exists():
        return html
    shutil.copyfile(notebook, OUT / page.with_suffix(".ipynb"))
    links = f'<a href="{notebook.name}" download>Download this notebook</a>'
    if github:
        place = f'{github}/blob/{SETTINGS["DEFAULT"]["branch"]}/nbs/{page.with_suffix(".ipynb")}'
        links += f' · <a href="https://colab.research.google.com/github/{place}">Open it in Colab</a>'
    return re.sub(r'(<header id="title-block-header".*?)(?=</header>)', rf'\1<p class="run-this">{links}</p>', html, count=1, flags=re.S)


ASKED = 'catch (e) { index = []; }'
FROM_FILE = 'catch (e) { index = await new Promise((done) => { const s = document.createElement("script"); s.src = offset + "search.js"; s.onload = () => done(window.searchIndex); s.onerror = () => done([]); document.head.append(s); }); }'


def searchable():
    "Pages opened as files may not ask for search.json, but may load a script"
    (OUT / "search.js").write_text(f'window.searchIndex = {(OUT / "search.json").read_text()};')
    script = OUT / "site_libs" / "smalldocs.js"
    text = script.read_text()
    if ASKED not in text:
        sys.exit(f"{script}: this version of smalldocs loads its index otherwise: look at `searchable`")
    script.write_text(text.replace(ASKED, FROM_FILE))


def broken(page):
    "Links of a page that lead to no file, or to no place in it"
    for link in sorted(set(re.findall(r'(?:href|src)="([^"]+)"', page.read_text()))):
        if re.match(r"[a-z]+:|//", link):
            continue
        name, place = urldefrag(unescape(link))
        to = page.parent / unquote(name.split("?")[0]) if name else page
        if not to.exists() or place and to.suffix == ".html" and f'id="{unquote(place)}"' not in to.read_text():
            yield link


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--github", metavar="USER/REPOSITORY", help="where the repository has been pushed to")
    args = parser.parse_args()
    render()
    searchable()
    pages = sorted(OUT.rglob("*.html"))
    named = {re.sub(r"/\d+[a-z]?_", "/", str(to.with_suffix(""))): str(to) for to in (p.relative_to(OUT) for p in pages)}
    for p in pages:
        page = p.relative_to(OUT)
        p.write_text(runnable(finish(p.read_text(), page.parent, named), page, args.github))
    for p in OUT.rglob("*.css"):
        p.write_text(re.sub(r"@import url\(https?:[^)]*\);", "", p.read_text()))  # a font of the theme
    lost = [f"{p.relative_to(OUT)}: {link}" for p in pages for link in broken(p)]
    if lost:
        sys.exit("\n".join(["links that lead nowhere:", *lost]))
