_base_ = [
    '../_base_/models/caa_r101-d16.py',  # ResNet-101, output stride 16
    '../_base_/datasets/cityscapes_769x769.py',  # 19 classes, batch 2 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_80k.py'  # SGD, lr 0.01
]
crop_size = (769, 769)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    # Windows of the crop: axial attention without residual knows rows and columns of its length.
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(512, 512)),
    backbone=dict(
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        multi_grid=(4, 8, 16)))  # 4 times 1, 2, 4
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
param_scheduler = [
    dict(type='PolyLR', eta_min=0., power=0.9, begin=0, end=80000, by_epoch=False)
]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    # Factors of the image's own size: 0.5 to 2 in steps of 0.1. (RandomResize has no steps.)
    dict(
        type='RandomChoice',
        transforms=[[dict(type='Resize', scale_factor=0.1 * step, keep_ratio=True)]
                    for step in range(5, 21)]),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
