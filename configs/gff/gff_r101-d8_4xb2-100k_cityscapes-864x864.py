_base_ = [
    '../_base_/models/gff_r50-d8.py',  # GFF on PSPNet with ResNet-50
    '../_base_/datasets/cityscapes_864x864_gff.py',  # 19 classes, batch 2 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_100k_lr1e-3_wd1e-4.py'  # SGD, lr 1e-3 falling to 0
]
# From the trained PSPNet, as the paper does to compare fusions.
load_from = 'work_dirs/pspnet_r101-d8_4xb2-100k_cityscapes-864x864/iter_100000.pth'
crop_size = (864, 864)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://resnet101_v1c',
    backbone=dict(depth=101),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(576, 576)))
