_base_ = [
    '../_base_/models/deeplabv3_r50-d8.py',  # DeepLabV3 with ResNet-50, output stride 8
    '../_base_/datasets/coco-voc12aug_513x513.py',  # COCO in VOC's 21 classes, VOC 2012 and SBD
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_300k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, polynomial decay to 0
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained='mmcls://mobilenet_v2',
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        widen_factor=1.,
        strides=(1, 2, 2, 2, 1, 1, 1),
        dilations=(1, 1, 1, 1, 1, 2, 2),
        out_indices=(1, 2, 4, 6),
        norm_cfg=dict(type='SyncBN', requires_grad=True)),
    decode_head=dict(
        in_channels=320,
        channels=256,
        # 1: the 1x1 branch.
        dilations=(1, 6, 12, 18),
        num_classes=21,
        align_corners=True),
    # The comparison of the thesis has none.
    auxiliary_head=None)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=4e-5))
train_dataloader = dict(batch_size=8, num_workers=8)
