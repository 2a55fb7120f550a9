"""The files that the stages wrote, as tables of a page: python benchmarks/gpu/tables.py [FOLDER]"""
import json, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLES = { # stage: title, key by which its rows are known, columns
    'right': [('Against float64 and the CPU', 'check',
               ('check', 'kind', 'form', 'dtype', 'N', 'M', 'D', 'own_negative', 'off', 'right'))],
    'fast': [('What the chip does at its best', 'ceiling', ('ceiling', 'TB_s', 'TFLOP_s')),
             ('The loss, forward and backward', 'loss',
              ('loss', 'kind', 'N', 'M', 'D', 'ms', 'peak_MiB', 'waits', 'off', 'out_of_memory')),
             ('Its kernels', 'kernel',
              ('kernel', 'kind', 'ms', 'GFLOP', 'MB', 'Gexp', 'TFLOP_s', 'TB_s', 'of_product', 'of_copy', 'floor_ms')),
             ('Tiles, warps and stages', 'tiles',
              ('tiles', 'as_it_is', 'BM', 'STEP', 'num_warps', 'num_stages', 'ms', 'cannot', 'why')),
             ('A training step', 'step',
              ('step', 'counted', 'images', 'crop', 'segments', 'ms', 'backbone_ms', 'loss_ms', 'clustering_ms',
               'share_of_loss', 'share_of_clustering', 'images_a_second', 'peak_MiB', 'waits', 'places')),
             ('Other parts', 'part',
              ('part', 'pixels', 'clusters', 'nodes', 'queries', 'prototypes', 'workers', 'crop', 'ms',
               'images_a_second', 'peak_MiB', 'waits', 'of_product', 'of_copy', 'skipped'))],
    'learn': [('The same steps for each', 'method', ('method', 'steps', 'seconds', 'miou_head', 'miou_retrieval')),
              ('mIoU of the head after each round', 'history', ())],
    'together': [('Two processes against one', 'check', ('check', 'processes', 'off', 'right')),
                 ('A training step of one and of two', 'step',
                  ('step', 'ms_of_one', 'ms_of_two', 'images_a_second_of_one', 'images_a_second_of_two')),
                 ('Photographs', 'method',
                  ('method', 'steps', 'seconds_of_one', 'seconds_of_two', 'miou_of_one', 'miou_of_two')),
                 ('Not run', 'skipped', ('skipped', 'why'))],
}


def shown(value):
    if value is None: return ''
    if isinstance(value, dict): return ', '.join(f'{k} {v}' for k, v in value.items())
    if not isinstance(value, float): return str(value)
    return f'{value:.0f}' if 100 <= abs(value) < 1e6 else f'{value:.3g}'


def table(rows, columns):
    "Markdown; columns that no row has are left out"
    columns = [c for c in columns if any(r.get(c) is not None for r in rows)]
    lines = [columns, ['---']*len(columns), *([shown(r.get(c)).replace('|', '/') for c in columns] for r in rows)]
    return '\n'.join(f"| {' | '.join(cells)} |" for cells in lines)


def curves(rows):
    "Columns are methods, rows are rounds"
    rounds = max(len(r['history']) for r in rows)
    return table([dict(round=k + 1) | {r['method']: r['history'][k]['miou'] for r in rows if k < len(r['history'])}
                  for k in range(rounds)], ('round', *(r['method'] for r in rows)))


def measured(folder=HERE/'results'):
    "What stages wrote on a GPU, by name; not what a dry run wrote"
    found = {p.stem: json.loads(p.read_text()) for p in sorted(Path(folder).glob('*.json')) if p.stem in TABLES}
    return {name: found[name] for name in TABLES if name in found and not found[name]['dry']}


def page(found):
    "Markdown of all stages"
    parts = []
    for name, said in found.items():
        m = said['machine'] or {}
        where = f"{m.get('gpu') or m.get('processor')}, torch {m.get('torch')}, {m.get('date')}"
        parts.append(f"### {name}\n\n{where}; {said.get('seconds')} s.")
        wrong = [r for r in said['rows'] if 'failed' in r]
        for title, key, columns in TABLES[name]:
            rows = [r for r in said['rows'] if key in r]
            if rows: parts.append(f'**{title}**\n\n{table(rows, columns) if columns else curves(rows)}')
        if wrong: parts.append(f"**Failed**\n\n{table(wrong, ('failed', 'error'))}")
    return '\n\n'.join(parts)


if __name__ == '__main__':
    print(page(measured(*sys.argv[1:2])) or 'nothing was measured: no results of a GPU in the folder')
