_base_ = [
    '../_base_/models/upernet_convnext.py',  # UPerNet with ConvNeXt-B of mmpretrain
    '../_base_/datasets/pascal_voc12_aug.py',  # VOC 2012 with the augmented training set, 21 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k_adamw-amp_layer-decay.py'  # AdamW, lr 1e-4, wd 0.05, mixed precision, 160k
]
custom_imports = dict(imports=['mmseg_fusion', 'mmpretrain.models'], allow_failed_imports=False)
crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/convnext/downstream/convnext-tiny_3rdparty_32xb128-noema_in1k_20220301-795e9634.pth'
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file, prefix='backbone.')),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=21),
    auxiliary_head=dict(in_channels=384, num_classes=21),
    # Chosen: the paper says nothing of testing; MMSegmentation tests its ConvNeXt so.
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)))
optim_wrapper = dict(paramwise_cfg=dict(num_layers=6))
