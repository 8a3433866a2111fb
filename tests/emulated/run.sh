#!/bin/bash
# run.sh [END]: runs the problems 0 to END - 1 (default: 2000) of tests/ops/problems.cpp here and on an emulated CPU
# with AVX-512; shows the lines that differ and fails where there are any. What it needs: README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
end=${1:-2000}
work=build/emulated
kernel=$(ls /boot/vmlinuz-*-cloud-amd64 | tail -n 1)
rm -rf $work
mkdir -p $work/root/{bin,proc} $work/iso/isolinux

flags=$(python3 -c 'import sys; sys.path.append("vaekernels"); import _build; print(*_build.CXX_FLAGS)')
${CXX:-g++} $flags -Icsrc -static tests/ops/problems.cpp csrc/cpu/{forward,backward}.cpp -o $work/root/problems
# Without float16, dtype 3: the vcvtps2ph of Bochs 2.7 breaks ties upwards instead of to even.
$work/root/problems 0 "$end" 2000 | grep -v "dtype 3" > $work/root/here

cp "$(command -v busybox)" $work/root/bin/
cat > $work/root/init << EOF
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
grep -q avx512vl /proc/cpuinfo || echo "NO AVX-512"
/problems 0 $end 2000 | grep -v "dtype 3" > /there
diff /here /there > /different && echo "ALL EQUAL"
head -n 40 /different
poweroff -f
EOF
chmod +x $work/root/init
(cd $work/root && find . | cpio -o -H newc --quiet) > $work/iso/initrd
cp "$kernel" $work/iso/vmlinuz
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 $work/iso/isolinux/
# Bochs 2.7 gives a wrong size for the compacted XSAVE area, for which Linux would turn AVX off.
cat > $work/iso/isolinux/isolinux.cfg << EOF
DEFAULT linux
LABEL linux
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND console=ttyS0 loglevel=2 mitigations=off tsc=reliable noxsaves clearcpuid=xsaves,xsavec
EOF
xorriso -as mkisofs -quiet -o $work/boot.iso -b isolinux/isolinux.bin -c isolinux/boot.cat \
  -no-emul-boot -boot-load-size 4 -boot-info-table $work/iso 2> $work/xorriso.log

# Without a sound card Bochs 2.7 ends in the driver of ALSA ("buffer overflow detected"), so it gets none.
cat > $work/bochsrc << EOF
display_library: rfb, options="timeout=0"
cpu: model=corei7_skylake_x, ips=50000000, ignore_bad_msrs=1
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
clock: sync=none
com1: enabled=1, mode=file, dev=$work/serial.txt
log: $work/bochs.log
panic: action=fatal
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
speaker: enabled=0
EOF
echo c > $work/continue # Debian's Bochs starts in its debugger, and ends with status 1 when the guest is off
nice bochs -q -f $work/bochsrc -rc $work/continue < /dev/null > $work/bochs.txt 2>&1 || true
cat $work/serial.txt
grep -q "ALL EQUAL" $work/serial.txt && ! grep -q "NO AVX-512" $work/serial.txt
