# Cityscapes for its test server: trained on the train and the val images, tested on the images
# without labels. Validation is on images that were trained on: it shows that training goes on, and
# no more.
_base_ = './cityscapes_864x864_gff.py'  # everything else

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            {{_base_.train_dataloader.dataset}},
            dict(
                type='CityscapesDataset',
                data_root='data/cityscapes/',
                data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
                pipeline={{_base_.train_pipeline}})
        ]))

test_dataloader = dict(
    dataset=dict(
        data_prefix=dict(_delete_=True, img_path='leftImg8bit/test'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(2048, 1024), keep_ratio=True),
            dict(type='PackSegInputs')
        ]))
img_ratios = [0.75, 1.0, 1.25, 1.5, 1.75]
tta_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=ratio, keep_ratio=True) for ratio in img_ratios],
            [dict(type='PackSegInputs')]
        ])
]

# PNG files with the ids that the server expects; needs pip install cityscapesscripts.
test_evaluator = dict(
    _delete_=True,
    type='CityscapesMetric',
    format_only=True,
    keep_results=True,
    output_dir='work_dirs/cityscapes_test')
