# Pascal Context without its background class, 59 classes, as gated fully fusion is trained:
# crops of 512 x 512, scales from 0.75 to 2, brightness jitter.
_base_ = './pascal_context_59.py'  # everything else
crop_size = (512, 512)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(520, 520), ratio_range=(0.75, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    # Brightness by up to 10 of 255; 1 is the least that the transform takes for the hue.
    dict(
        type='PhotoMetricDistortion',
        brightness_delta=10,
        contrast_range=(1.0, 1.0),
        saturation_range=(1.0, 1.0),
        hue_delta=1),
    dict(type='PackSegInputs')
]

# The paper's scales, without flips: tools/test.py --tta
img_ratios = [0.75, 1.0, 1.25, 1.5, 1.75]
tta_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=ratio, keep_ratio=True) for ratio in img_ratios],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')]
        ])
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
