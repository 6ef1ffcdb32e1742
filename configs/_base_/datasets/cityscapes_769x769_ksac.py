# Cityscapes as KSAC reads it, thesis section 2.3.1.5: crops of 769 x 769; scales from 0.5 to 2 in
# steps of 0.25, flip and crop are the only augmentation; tested at 1025 x 2049.
_base_ = './cityscapes.py'  # everything else
crop_size = (769, 769)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    # Factors of the image's own size, 1024 x 2048. (RandomResize has no steps.)
    dict(
        type='RandomChoice',
        transforms=[[dict(type='Resize', scale_factor=0.25 * step, keep_ratio=True)]
                    for step in range(2, 9)]),
    # What is missing is filled by the data preprocessor: the mean colour, label 255.
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2049, 1025), keep_ratio=True),
    # After Resize: the result is compared at the size of the annotation.
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
