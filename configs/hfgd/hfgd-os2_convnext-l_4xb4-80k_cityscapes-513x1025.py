_base_ = [
    '../_base_/models/hfgd_convnext-l.py',  # HFGD with ConvNeXt-L
    '../_base_/datasets/cityscapes_513x1025.py',  # Cityscapes, photometric distortion
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k_adamw_wd0.05.py'  # AdamW, lr 4e-5, wd 0.05, 40k
]
custom_imports = dict(imports=['mmseg_fusion', 'mmpretrain.models'], allow_failed_imports=False)
crop_size = (513, 1025)
data_preprocessor = dict(size=crop_size)
model = dict(
    type='CAREncoderDecoder',
    car=dict(layer='encoder.out_conv'),
    data_preprocessor=data_preprocessor,
    # Windows of the crop: axial attention without residual knows rows and columns of its length.
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(342, 683)),
    decode_head=dict(upsampler=dict(output_stride=2), num_classes=19))
train_dataloader = dict(batch_size=4, num_workers=4)
param_scheduler = [
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=0, end=80000, by_epoch=False)
]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
