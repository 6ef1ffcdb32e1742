# As coco-stuff10k_513x513.py, with photometric distortion: HFGD's advanced recipe.
_base_ = './coco-stuff10k_513x513.py'  # everything else
crop_size = (513, 513)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    # Factors of the image's own size: 0.5 to 2 in steps of 0.1. (RandomResize has no steps.)
    dict(
        type='RandomChoice',
        transforms=[[dict(type='Resize', scale_factor=0.1 * step, keep_ratio=True)]
                    for step in range(5, 21)]),
    # What is missing is filled by the data preprocessor: the mean colour, label 255.
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
