_base_ = [
    '../_base_/models/hfgd_swin-l.py',  # HFGD with Swin-L
    '../_base_/datasets/pascal_context_59_513x513_brightness.py',  # 59 classes, batch 4 per GPU
    '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k_wd1e-4.py'  # SGD, lr 0.01, wd 1e-4, 40k
]
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size, test_cfg=dict(size=crop_size))
model = dict(
    type='CAREncoderDecoder',
    car=dict(layer='encoder.out_conv'),
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        upsampler=dict(type='SemanticFPNHead'),
        guidance=False,
        axial_attention=False,
        num_classes=59))
