_base_ = [
    '../_base_/models/hfgd_r50.py',  # HFGD with ResNet-50
    '../_base_/datasets/cityscapes_513x1025_plain.py',  # Cityscapes
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_30k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 30k
]
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
