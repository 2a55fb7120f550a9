from pathlib import Path
from spml_kit.data.importers import *
from spml_kit.data.readers import *
from spml_kit.data.shapes import *
for f in sorted(Path('tests/fixtures/importers').iterdir()):
    try:
        p=plan_import(f); k=p.annotations(p.pictures[0]); L=kit_labels(k,(60,80)) 
    except Exception as e: print(f.name,'ERR',repr(e)[:300]); continue
    print(f.name,p.tool,p.classes.names,(L==1).sum(),(L==2).sum(),(L==0).sum(),dict(p.skipped),len(p.pictures))
