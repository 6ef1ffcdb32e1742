_base_ = [
    '../_base_/models/gff_r50-d8.py',  # GFF on PSPNet with ResNet-50
    '../_base_/datasets/ade20k_512x512_gff.py',  # 150 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_150k_lr1e-3_wd1e-4.py'  # SGD, lr 1e-3 falling to 0
]
crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(depth=101),
    decode_head=dict(dfp='conv', num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)))
