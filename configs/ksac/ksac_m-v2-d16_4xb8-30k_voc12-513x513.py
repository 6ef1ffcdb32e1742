_base_ = [
    '../_base_/models/ksac_r50-d16.py',  # KSAC with ResNet-50, output stride 16
    '../_base_/datasets/pascal_voc12_513x513.py',  # VOC 2012 alone, 21 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, polynomial decay to 0
]
# The last stage, from VOC and SBD.
load_from = 'work_dirs/ksac_m-v2-d16_coco_4xb8-40k_voc12aug-513x513/iter_40000.pth'
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
    decode_head=dict(in_channels=320))
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=4e-5))
train_dataloader = dict(batch_size=8, num_workers=8)
