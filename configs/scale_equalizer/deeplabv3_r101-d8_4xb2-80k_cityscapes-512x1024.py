_base_ = [
    '../_base_/models/deeplabv3_r50-d8.py',  # DeepLabV3 with ResNet-50, output stride 8
    '../_base_/datasets/cityscapes.py',  # 19 classes, batch 2 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_80k.py'  # SGD, lr 0.01, wd 5e-4
]
crop_size = (512, 1024)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(depth=101))
