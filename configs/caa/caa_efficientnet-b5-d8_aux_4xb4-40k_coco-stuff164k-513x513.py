_base_ = [
    '../_base_/models/caa_efficientnet-b7-d8.py',  # EfficientNet-B7, output stride 8
    '../_base_/datasets/coco-stuff164k_513x513.py',  # 171 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k_wd1e-4.py'  # SGD, lr 0.01 falling to 0
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/efficientnet/efficientnet-b5_3rdparty_8xb32-aa_in1k_20220119-2cab8b78.pth'
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        arch='b5',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file, prefix='backbone.')),
    decode_head=dict(in_channels=2048, num_classes=171),
    auxiliary_head=dict(in_channels=2048, num_classes=171))
