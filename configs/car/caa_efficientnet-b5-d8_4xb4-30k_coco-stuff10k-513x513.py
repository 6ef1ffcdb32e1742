_base_ = [
    '../_base_/models/caa_efficientnet-b7-d8.py',  # CAA with EfficientNet-B7, output stride 8
    '../_base_/datasets/coco-stuff10k_513x513_brightness.py',  # 171 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 30k
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
# ImageNet-1K with AutoAugment, as for B7.
checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/efficientnet/efficientnet-b5_3rdparty_8xb32-aa_in1k_20220119-2cab8b78.pth'
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        arch='b5',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file, prefix='backbone.')),
    decode_head=dict(
        in_channels=2048,
        dropout_ratio=0.,
        num_classes=171),
    auxiliary_head=None)
