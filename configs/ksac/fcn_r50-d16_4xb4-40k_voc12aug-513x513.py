_base_ = [
    '../_base_/models/fcn_r50-d8.py',  # FCN with ResNet-50, output stride 8
    '../_base_/datasets/pascal_voc12_aug_513x513.py',  # VOC 2012 + SBD, 21 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, polynomial decay to 0
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)),
    decode_head=dict(
        channels=256,
        num_convs=1,
        concat_input=False,
        num_classes=21,
        align_corners=True),
    # The comparison of the thesis has none.
    auxiliary_head=None)
# DeepLab's rate for a start from ImageNet.
optim_wrapper = dict(optimizer=dict(lr=7e-3))
