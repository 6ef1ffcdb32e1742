_base_ = [
    '../_base_/models/denseaspp_densenet121-d8.py',  # DenseASPP with DenseNet-121
    '../_base_/datasets/cityscapes_864x864_gff.py',  # 19 classes, batch 2 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_100k_lr1e-3_wd1e-4.py'  # SGD, lr 1e-3 falling to 0
]
crop_size = (864, 864)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(576, 576)))
