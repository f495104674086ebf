"Short versions of the main job on real images"
import re
import numpy as np, pandas as pd
import pytest
from cellseg.core import FieldsError
from cellseg.crossval import CrossValidation
from cellseg.fields import check_leaks, find_fields, kfold_fields, load_fields
from cellseg.io import read_image
from cellseg.metrics import dice_scores
from cellseg.predict import Segmenter
from sklearn.metrics import roc_auc_score

def majority_dice(path, n_classes):
    "Mean Dice of calling every pixel the most frequent class: what a network must beat"
    label = read_image(path)
    guess = np.full_like(label, np.bincount(label.astype(int).ravel()).argmax())
    return np.nanmean(dice_scores(guess.astype(np.uint8), label.astype(np.uint8), n_classes))

def test_cellpainting(cellseg, data, tmp_path):
    "One field with bright-field, DNA and whole-cell stain: labels, training on three tiles, scoring on the fourth, predicting the field"
    pattern,bf = 'r{row}c{column}f{site}p{plane}-ch{channel}sk1fk1fl1.tiff','brightfield=1'
    code,out,err = cellseg('train', data/'cellpainting_bf', '--pattern', pattern, '--channels', bf, 'cytoplasm=3', 'nuclei=5', '--tiles', '2x2', '--folds', 4,
        '--size', 96, '--patches', 120, '--epochs', 6, '--out', tmp_path/'run')
    assert code==0, err
    fields,scores = load_fields(tmp_path/'run'/'fields.csv'),pd.read_csv(tmp_path/'run'/'scores.csv', dtype={'field':str})
    held = fields[fields.fold==0].iloc[0]
    assert scores.dice.mean()>majority_dice(held.label, 3)+.1
    report = (tmp_path/'run'/'report.html').read_text(encoding='utf-8')
    assert 'tiles cut from the same fields' in report and 'data:image/png' in report
    code,out,err = cellseg('predict', tmp_path/'run', data/'cellpainting_bf', '--pattern', pattern, '--channels', bf, '--out', tmp_path/'out')
    assert code==0, err
    assert read_image(next((tmp_path/'out').glob('*_label.tif'))).shape==(1080,1080)

def test_brifiseg(cellseg, data, tmp_path):
    """Bright-field and nuclear masks given: two classes, one field left out. So short a training does not settle where nuclei end,
    but the probability it gives must be higher in nuclei than elsewhere: by chance 0.5 of pairs of pixels would be ranked rightly"""
    code,out,err = cellseg('train', data/'brifiseg', '--pattern', 'A549_{field}_{channel}.tif', '--channels', 'brightfield=BF', 'label=nuclei', '--classes', 'background',
        'nucleus', '--folds', 5, '--size', 96, '--patches', 120, '--epochs', 6, '--out', tmp_path/'run')
    assert code==0, err
    fields,scores = load_fields(tmp_path/'run'/'fields.csv'),pd.read_csv(tmp_path/'run'/'scores.csv', dtype={'field':str})
    held = fields[fields.fold==0]
    assert len(fields)==5 and list(scores.field.unique())==list(held.field)
    row = held.iloc[0]
    probs = Segmenter.load(tmp_path/'run').predict(read_image(row.brightfield)).probs[1]
    assert roc_auc_score(read_image(row.label).ravel()>0, probs.ravel())>.75

def test_crossval_brifiseg(cellseg, data, tmp_path):
    "Each of five fields held out once, in two workers; far too short to learn, so that only the way is tested"
    args = ('crossval', data/'brifiseg', '--pattern', 'A549_{field}_{channel}.tif', '--channels', 'brightfield=BF', 'label=nuclei', '--classes', 'background', 'nucleus',
        '--size', 64, '--batch', 4, '--patches', 8, '--epochs', 1, '--jobs', 2, '--out', tmp_path/'cv')
    code,out,err = cellseg(*args)
    assert code==0, err
    cv = CrossValidation(tmp_path/'cv')
    assert len(cv.scores)==10 and cv.scores.field.nunique()==5 and cv.fields.fold.tolist()==cv.scores.drop_duplicates('field').set_index('field').fold[cv.fields.field].tolist()
    for f in cv.fields.itertuples():
        probs = read_image(f.probs)
        assert probs.shape==(2,512,512) and probs.dtype==np.uint8 and ((probs[1]>probs[0])<=(read_image(f.prediction)==1)).all()
    html = (tmp_path/'cv'/'report.html').read_text(encoding='utf-8')
    assert all(re.search(rf'<p>\s*{f}\s*: mean Dice', html) for f in cv.fields.field) and '95 % interval' in html

def test_rows_and_columns_of_a_plate(data):
    "Rows and columns of wells, taken from file names, stay in one fold; folds by field are found to share them"
    fields = find_fields(data/'sbs_plate', 'Channel{channel}-{number}-{row}-{column}.tif', dict(cytoplasm='1', nuclei='2'))
    by_row,by_column = kfold_fields(fields, 2, group='row'),kfold_fields(fields, 4, group='column')
    assert by_row.groupby('fold').row.agg(set).tolist() in ([{'A'},{'B'}],[{'B'},{'A'}])
    assert by_column.groupby('column').fold.nunique().max()==1 and by_column.fold.value_counts().tolist()==[6]*4
    for f,group in ((by_row,'row'),(by_column,'column')): assert check_leaks(f, group, ['nuclei']).empty
    assert (check_leaks(kfold_fields(fields, 4), 'column', ['nuclei']).why.str.startswith('the same column')).any()
    with pytest.raises(FieldsError, match='3 folds of 2 different values of row'): kfold_fields(fields, 3, group='row')
